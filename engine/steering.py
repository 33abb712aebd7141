"""Edits of the hidden states of a text: with which vector, at which taps and positions.

Positions are absolute: those of the text, whatever the chunk, the padding or the cache. How the
edits of a batch get to the device is the subject of `edit_table.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.edits import MODES
from ..model.arguments import choice, integers, is_integer, number
from ..model.config import ModelConfig
from ..model.fields import shown
from ..model.points import Layers, Tap, check_point, parse_layers
from ..model.summary import one_line
from .tap_names import tap_name
from .vector_checks import LARGEST_STATE, check_direction, check_move, check_unit, check_width
from .vectors import SteeringVectors

POSITION_RULES = ("all", "prompt", "generated", "last_prompt", "label")
DEFAULT_POINT = "resid_post"  # of a vector that comes without a point
MOST_POSITIONS = 2**62  # larger numbers, which tensors cannot hold, are never reached
Rule = str | int | Sequence[int]


@dataclass(frozen=True)
class Steering:
    """Edit `point` of `layers` with a vector, at some positions of a text.

    vector: [d], for all layers, or `SteeringVectors`, of which each layer gets the vector made for
    it; then "all" layers are those that have one, and the point may be left out where the vectors
    have but one. layers: as in `LensSpec`. point: "resid_post" for a lone vector without one.
    mode: one of kernels.edits.MODES. scale: multiplies the vector; with "clamp" it is the component
    that the state gets along the vector; a tensor that requires a gradient stays one, for
    `steered`. unit: what scale counts in, "vector" as given, or
    "resid_norm": then a scale of 1 makes the change (with "clamp" the component) as long as the
    states at the tap are on average. positions: "all"; "prompt"; "generated", those whose output
    is a new token, so from the prompt's last on, as for a lens; "last_prompt", the prompt's last;
    "label", the one after it; a number, all from that position on; or a sequence of absolute
    positions.

    Edits that meet at a tap and position act one after another, in the order of their list.

    Raises ValueError for a vector that is not flat, is not finite or is all zeros, for taps
    without a vector, for a unit that does not apply to the vector or the mode, and for unknown
    names.
    """

    vector: Tensor | SteeringVectors
    layers: Layers = "all"
    point: str | None = None
    mode: str = "add"
    scale: float | Tensor = 1.0
    positions: Rule = "all"
    unit: str = "vector"

    __repr__ = one_line

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor | SteeringVectors):
            raise ValueError(f"a steering vector is a tensor, not a {type(self.vector).__name__}")
        point = _default_point(self.vector) if self.point is None else self.point
        checked: dict[str, Any] = {
            "mode": choice(self.mode, "steering mode", MODES),
            "scale": self._checked_scale(),
            "positions": _checked_positions(self.positions),
            "point": check_point(point),
        }
        if not isinstance(self.layers, str):
            checked["layers"] = tuple(integers(self.layers, "layers"))
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen, but still being constructed
        self._check_unit()
        self._check_vector()

    def _checked_scale(self) -> float | Tensor:
        if isinstance(self.scale, Tensor) and self.scale.requires_grad:
            if self.scale.numel() != 1 or not self.scale.isfinite():
                raise ValueError("a steering scale that is trained is one finite number")
            return self.scale
        return number(self.scale, "the steering scale")

    def _check_unit(self) -> None:
        check_unit(self.unit)
        if self.unit == "vector":
            return
        if isinstance(self.vector, Tensor):
            raise ValueError(
                "unit resid_norm needs SteeringVectors, which know the norm of the states: "
                "a plain tensor does not"
            )
        if self.mode == "ablate":
            raise ValueError(
                "unit resid_norm does not apply to mode ablate, whose scale is the fraction removed"
            )

    def _check_vector(self) -> None:
        if isinstance(self.vector, Tensor):
            check_direction(self.vector, "the steering vector")
            return
        for tap in self.taps(self.vector.n_layers):
            self.scale_at(tap)  # raises where a norm is not known

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for vectors of another model, a layer that does not exist, and an edit
        so large that the norm after it cannot be told.
        """
        if isinstance(self.vector, Tensor):
            check_width("the steering vector has", self.vector.numel(), config)
        else:
            self.vector.check(config)
        taps = self.taps(config.n_layers)
        for tap in taps[:1] if isinstance(self.vector, Tensor) else taps:
            check_move(self.move_at(tap), self.described_at(tap))

    def check_reach(self, prompt_length: int, n_fed: int, name: str) -> None:
        """Raise ValueError where none of the positions is among the n_fed of a text."""
        if not self.mask(prompt_length, n_fed).any():
            raise ValueError(
                f"an edit at positions {shown(self.positions)} touches nothing of {name}, of which "
                f"positions 0 to {n_fed - 1} are read ({prompt_length} of them its prompt's)"
            )

    def taps(self, n_layers: int) -> list[Tap]:
        """The taps that are edited, in order of layers."""
        assert self.point is not None  # __post_init__ filled it in
        if isinstance(self.vector, SteeringVectors):
            return self.vector.taps_at(self.point, self.layers)
        return [Tap(layer, self.point) for layer in parse_layers(self.layers, n_layers)]

    def vector_at(self, tap: Tap) -> Tensor:
        """[d]: the vector at one of `taps`."""
        return self.vector if isinstance(self.vector, Tensor) else self.vector.at(tap)

    def scale_at(self, tap: Tap) -> float | Tensor:
        """The scale at one of `taps`, in the unit that kernels.edits counts in."""
        if isinstance(self.vector, Tensor) or self.unit == "vector":
            return self.scale
        if self.mode == "clamp":
            return self.scale * self.vector.resid_norm(tap)
        return self.scale * self.vector.unit_scale(tap, self.unit)

    def described_at(self, tap: Tap) -> str:
        """The edit at one of `taps`, in messages."""
        return f"the edit at {tap_name(tap)}, mode {self.mode}, scale {float(self.scale):g}"

    def move_at(self, tap: Tap) -> float:
        """How far a state moves at one of `taps`, at most."""
        scale = abs(float(self.scale_at(tap)))
        if self.mode == "ablate":
            return scale * LARGEST_STATE
        if self.mode == "clamp":
            return scale
        return scale * float(self.vector_at(tap).detach().double().norm())

    def mask(self, prompt_length: int, capacity: int) -> Tensor:
        """[capacity] bool: the positions that are edited."""
        return self.reaches(torch.arange(capacity), prompt_length)

    def reaches(self, position: Tensor, prompt_length: int) -> Tensor:
        """Whether each of absolute positions [...] int64 is edited."""
        if isinstance(self.positions, int):
            return position >= min(self.positions, MOST_POSITIONS)
        if not isinstance(self.positions, str):
            within = [each for each in self.positions if each < MOST_POSITIONS]
            listed = torch.tensor(within, dtype=torch.int64, device=position.device)
            return torch.isin(position, listed)
        return {
            "all": position >= 0,
            "prompt": position < prompt_length,
            "generated": position >= prompt_length - 1,
            "last_prompt": position == prompt_length - 1,
            "label": position == prompt_length,
        }[self.positions]


def _checked_positions(rule: Any) -> Rule:
    """A rule by name, a first position, or a tuple of positions."""
    if isinstance(rule, str) and rule in POSITION_RULES:
        return rule
    try:
        found = integers(rule, "steering positions")
    except ValueError:
        raise ValueError(
            f"steering positions {shown(rule)}: there are {', '.join(POSITION_RULES)}, a first "
            "position, or a list of positions"
        ) from None
    if not found:
        raise ValueError("steering positions are an empty list: name at least one")
    for position in found:
        if position < 0:
            raise ValueError(
                f"steering position {position} is below 0: positions count from the text's start"
            )
    return found[0] if is_integer(rule) else tuple(found)


def _default_point(vector: Tensor | SteeringVectors) -> str:
    if isinstance(vector, Tensor):
        return DEFAULT_POINT
    points = vector.points
    if len(points) > 1:
        raise ValueError(f"the steering vectors have points {', '.join(points)}: name one of them")
    return points[0]

"""What to change in the hidden states of a text, and where.

Positions are absolute: those of the text, whatever the chunk, the padding or the cache. How the
edits of a batch get to the device is told in `edit_table.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..kernels.edits import MODES
from ..model.config import ModelConfig
from ..model.points import POINTS, Layers, Tap, check_point, parse_layers

POSITION_RULES = ("all", "prompt", "generated", "last_prompt", "label")
UNITS = ("vector", "resid_norm")
DEFAULT_POINT = "resid_post"  # of a vector that comes without a place
Rule = str | int | Sequence[int]


@runtime_checkable
class VectorsByPlace(Protocol):
    """A vector for each of some places of a model, and how long the states there are."""

    @property
    def taps(self) -> Sequence[Tap]:
        """The places that have a vector."""
        ...

    @property
    def d(self) -> int:
        """The vectors' width."""
        ...

    @property
    def n_layers(self) -> int:
        """Blocks of the model that the vectors were made for."""
        ...

    def at(self, tap: Tap) -> Tensor:
        """[d] float32. Raises ValueError for a place without a vector."""
        ...

    def resid_norm(self, tap: Tap) -> float:
        """Mean norm of the states at a place. Raises ValueError where it is not known."""
        ...


@dataclass(frozen=True)
class Steering:
    """Edit `point` of `layers` with a vector, at some positions of a text.

    vector: [d], for all layers, or `VectorsByPlace`, of which each layer gets its own; then "all"
    layers are those that have one, and the point may be left out where they have but one.
    layers: as in `LensSpec`. point: "resid_post" if a lone vector comes without. mode: one of
    kernels.edits.MODES. scale: multiplies the vector; with "clamp" it is the component that the
    state gets along the vector. unit: what scale counts in, "vector" as told, or "resid_norm":
    then a scale of 1 makes the change (with "clamp" the component) as long as the states at the
    place are on average. positions: "all"; "prompt"; "generated", the positions of new tokens;
    "last_prompt", the prompt's last; "label", the one after it; a number, all from that position
    on; or a sequence of absolute positions.

    Edits that meet at a place and position act one after another, in the order of their list.

    Raises ValueError for a vector that is not flat, is not finite or is all zeros, for places
    without a vector, for a unit that the vector or the mode has no use for, and for unknown words.
    """

    vector: Tensor | VectorsByPlace
    layers: Layers = "all"
    point: str | None = None
    mode: str = "add"
    scale: float = 1.0
    positions: Rule = "all"
    unit: str = "vector"

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor | VectorsByPlace):
            raise ValueError(f"a steering vector is a tensor, not a {type(self.vector).__name__}")
        if self.mode not in MODES:
            raise ValueError(f"steering mode {self.mode}: there are {', '.join(MODES)}")
        if math.isnan(self.scale):
            raise ValueError("the steering scale is not a number")
        if math.isinf(self.scale):
            raise ValueError("the steering scale is not finite")
        _check_positions(self.positions)
        self._check_unit()
        point = _default_point(self.vector) if self.point is None else self.point
        check_point(point)
        object.__setattr__(self, "point", point)  # frozen, but this is still its making
        self._check_vectors()

    def _check_unit(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"steering unit {self.unit}: there are {', '.join(UNITS)}")
        if self.unit == "vector":
            return
        if isinstance(self.vector, Tensor):
            raise ValueError(
                "unit resid_norm needs vectors that know how long the states at their place are: "
                "a plain tensor does not"
            )
        if self.mode == "ablate":
            raise ValueError(
                "unit resid_norm means nothing to mode ablate, whose scale is the share that goes"
            )

    def _check_vectors(self) -> None:
        if isinstance(self.vector, Tensor):
            if self.vector.ndim != 1:
                raise ValueError(f"a steering vector has one dim, not {list(self.vector.shape)}")
            _check_vector(self.vector, "the steering vector")
            return
        for tap in self.taps(self.vector.n_layers):
            name = f"the steering vector of layer {tap.layer}, {tap.point}"
            vector = self.vector.at(tap)
            if vector.shape != (self.vector.d,):
                raise ValueError(f"{name} is {list(vector.shape)}, not [{self.vector.d}]")
            _check_vector(vector, name)
            self.scale_at(tap)  # raises where a norm is not known

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for vectors of another model, or a layer that does not exist."""
        if isinstance(self.vector, Tensor):
            name, width = "the steering vector has", self.vector.shape[0]
        else:
            name, width = "the steering vectors have", self.vector.d
            if self.vector.n_layers != config.n_layers:
                raise ValueError(
                    f"the steering vectors are for a model of {self.vector.n_layers} layers, "
                    f"this one has {config.n_layers}"
                )
        if width != config.d:
            raise ValueError(f"{name} {width} numbers, the model {config.d}")
        self.taps(config.n_layers)

    def taps(self, n_layers: int) -> list[Tap]:
        """The places that are edited, in order of layers."""
        assert self.point is not None  # since it was made
        if isinstance(self.vector, Tensor):
            layers = parse_layers(self.layers, n_layers)
        else:
            layers = _layers_held(self.vector, self.layers, self.point)
        return [Tap(layer, self.point) for layer in layers]

    def vector_at(self, tap: Tap) -> Tensor:
        """[d]: the vector at one of `taps`."""
        return self.vector if isinstance(self.vector, Tensor) else self.vector.at(tap)

    def scale_at(self, tap: Tap) -> float:
        """The scale at one of `taps`, in the unit that kernels.edits counts in."""
        if isinstance(self.vector, Tensor) or self.unit == "vector":
            return self.scale
        size = self.scale * self.vector.resid_norm(tap)
        return size if self.mode == "clamp" else size / float(self.vector.at(tap).double().norm())

    def mask(self, prompt_length: int, capacity: int) -> Tensor:
        """[capacity] bool: the positions that are edited."""
        at = torch.arange(capacity)
        if isinstance(self.positions, int):
            return at >= self.positions
        if not isinstance(self.positions, str):
            return torch.isin(at, torch.tensor(list(self.positions), dtype=torch.int64))
        return {
            "all": at >= 0,
            "prompt": at < prompt_length,
            "generated": at >= prompt_length,
            "last_prompt": at == prompt_length - 1,
            "label": at == prompt_length,
        }[self.positions]


def _check_vector(vector: Tensor, name: str) -> None:
    if not vector.isfinite().all():
        raise ValueError(f"{name} is not finite")
    if not vector.any():
        raise ValueError(f"{name} is all zeros")


def _check_positions(rule: object) -> None:
    """What the annotation says, said again for callers without a type checker."""
    choice = f"there are {', '.join(POSITION_RULES)}, a first position, or a list of positions"
    if isinstance(rule, str):
        if rule not in POSITION_RULES:
            raise ValueError(f"steering positions {rule!r}: {choice}")
        return
    numbers = list(rule) if isinstance(rule, Sequence) else [rule]
    if not numbers:
        raise ValueError("steering positions are an empty list: name at least one")
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"steering positions of type {type(number).__name__}: {choice}")
        if number < 0:
            raise ValueError(
                f"steering position {number} is below 0: positions count from the text's start"
            )


def _default_point(vectors: Tensor | VectorsByPlace) -> str:
    if isinstance(vectors, Tensor):
        return DEFAULT_POINT
    points = _points_held(vectors)
    if len(points) > 1:
        raise ValueError(f"the steering vectors have points {', '.join(points)}: name one of them")
    return points[0]


def _points_held(vectors: VectorsByPlace) -> list[str]:
    held = {tap.point for tap in vectors.taps}
    if not held:
        raise ValueError("the steering vectors hold no vector")
    return [point for point in POINTS if point in held]


def _layers_held(vectors: VectorsByPlace, layers: Layers, point: str) -> list[int]:
    """Those of `layers` at `point`, all of which must have a vector."""
    held = sorted({tap.layer for tap in vectors.taps if tap.point == point})
    if not held:
        points = ", ".join(_points_held(vectors))
        raise ValueError(f"the steering vectors have none at {point}: they have {points}")
    if layers == "all":
        return held
    wanted = parse_layers(layers, vectors.n_layers)
    missing = [layer for layer in wanted if layer not in held]
    if missing:
        raise ValueError(
            f"the steering vectors have none at layer {missing[0]}, {point}: "
            f"they have layers {', '.join(map(str, held))}"
        )
    return wanted

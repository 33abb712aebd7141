"""The states that a lens reads of a text, and the statistics that it reports of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..model.arguments import choice, choices, integer, integers
from ..model.config import ModelConfig
from ..model.fields import shown
from ..model.points import POINTS, Layers, Tap, parse_layers

POSITIONS = ("all", "prompt", "generated", "last")
MODES = ("live", "deferred")


@dataclass(frozen=True)
class LensSpec:
    """The states to decode, and the statistics to report of them.

    points: of `POINTS`. layers: "all", or block numbers, as a sequence or as text like
    "0-3,8,-1" (negative counts from the end). top_k: candidates kept per row. targets: whose
    log-prob and rank to report: "next" (the token that follows), a token id, or None. positions:
    "all"; those of the "prompt"; "generated", the positions whose prediction was a generated token,
    so from the prompt's last on; or "last", the prompt's last alone. mode: "live" decodes the
    states of a generated token in the step that chooses it (with targets="next" in the step after,
    as the rank of a token can be counted only once it is known); "deferred" keeps the states of
    RING_TOKENS steps and decodes them together, which costs less where reading the weight is not
    what bounds the product. Both give the same trace. Raises ValueError for values of another kind.
    """

    points: str | Sequence[str] = ("resid_post",)
    layers: Layers = "all"
    top_k: int = 5
    targets: Literal["next"] | int | None = "next"
    positions: str = "all"
    mode: str = "live"

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "points": tuple(choices(self.points, "point", POINTS)),
            "top_k": integer(self.top_k, "top_k"),
            "positions": choice(self.positions, "positions", POSITIONS),
            "mode": choice(self.mode, "lens mode", MODES),
        }
        if not isinstance(self.layers, str):
            checked["layers"] = tuple(integers(self.layers, "layers"))
        if not isinstance(self.targets, str) and self.targets is not None:
            checked["targets"] = integer(self.targets, "targets")
        elif self.targets not in ("next", None):
            raise ValueError(f"targets {shown(self.targets)}: give next, a token id, or None")
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen, but still being constructed

    def taps(self, config: ModelConfig) -> tuple[Tap, ...]:
        """The taps to read, in the order in which data passes through them.

        Raises ValueError naming a layer that the model does not have.
        """
        layers = parse_layers(self.layers, config.n_layers)
        points = [point for point in POINTS if point in self.points]
        return tuple(Tap(layer, point) for layer in layers for point in points)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for anything the model cannot answer."""
        self.taps(config)
        if not 1 <= self.top_k <= config.vocab_size:
            raise ValueError(f"top_k {self.top_k} is outside 1 to {config.vocab_size}")
        if isinstance(self.targets, int) and not 0 <= self.targets < config.vocab_size:
            raise ValueError(
                f"target {self.targets} is outside the vocabulary of {config.vocab_size}"
            )

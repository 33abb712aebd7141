"""The content of pictures and tables of a Trace: taps down, positions across, a cell for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from ..model.points import Tap


@dataclass(frozen=True)
class Cell:
    """The lens of one tap at one position."""

    candidates: list[tuple[str, float]]  # texts and probabilities, the likeliest first
    entropy: float  # nats
    kl_to_final: float  # nats
    target: tuple[int, float] | None  # its rank and probability
    is_hit: bool  # whether the likeliest candidate is the target

    @property
    def token(self) -> str:
        return self.candidates[0][0]

    @property
    def probability(self) -> float:
        return self.candidates[0][1]


@dataclass(frozen=True)
class Grid:
    """Cells of P taps at T positions, with texts whose hidden characters are made visible."""

    labels: list[str]  # P, of the taps
    tokens: list[str]  # T, at the positions
    targets: list[str]  # T, "" where there is none
    cells: list[list[Cell]]  # [P][T]


def tap_labels(taps: Sequence[Tap]) -> list[str]:
    """ "layer 3" each, or "3 attn_out" where several points are shown."""
    is_lone = len({tap.point for tap in taps}) == 1
    return [f"layer {tap.layer}" if is_lone else f"{tap.layer} {tap.point}" for tap in taps]


def fitted(text: str, columns: int) -> str:
    """A text cut to so many columns of a terminal, where some characters take two and some none."""
    if cell_len(text) <= columns:
        return text
    return set_cell_size(text, columns - 1).rstrip(" ") + "…"

"""The content of pictures and tables of a Trace: taps down, positions across, a cell for each."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ..model.points import Tap

_MARKS = {"\r": "␍", "\n": "⏎", "\t": "⇥"}
_BIDI_CONTROLS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


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
    """Cells of P taps at T positions, with texts whose control characters are made visible."""

    labels: list[str]  # P, of the taps
    tokens: list[str]  # T, at the positions
    targets: list[str]  # T, "" where there is none
    cells: list[list[Cell]]  # [P][T]


def tap_labels(taps: Sequence[Tap]) -> list[str]:
    """ "layer 3" each, or "3 attn_out" where several points are shown."""
    is_lone = len({tap.point for tap in taps}) == 1
    return [f"layer {tap.layer}" if is_lone else f"{tap.layer} {tap.point}" for tap in taps]


def visible(token: str) -> str:
    """A token's text with its line ends, control characters and outer space made visible."""
    shown = "".join(map(_shown, token))
    if shown.strip(" ") == "":
        return "·" * len(shown)
    return "·" + shown[1:] if shown.startswith(" ") else shown


def printable(text: str) -> str:
    """A text with its control characters made visible, but for line ends and tabs."""
    return "".join(c if c in "\n\t" else _shown(c) for c in text)


def _shown(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    if character < " ":
        return chr(0x2400 + ord(character))  # the Unicode picture of a control character
    if unicodedata.category(character) == "Cc" or character in _BIDI_CONTROLS:
        return f"<U+{ord(character):04X}>"
    return character

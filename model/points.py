"""The points of a model that can be read and edited, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from .arguments import choice, integers

# In the order in which data passes through a block.
POINTS = ("resid_pre", "attn_norm", "attn_out", "resid_mid", "mlp_norm", "mlp_out", "resid_post")
Layers = Literal["all"] | str | int | Sequence[int]


class Tap(NamedTuple):
    """One state of a model: a point (one of POINTS) of block `layer`."""

    layer: int
    point: str

    @property
    def canonical(self) -> Tap:
        """One name for what has two: resid_post of a block is resid_pre of the next."""
        return Tap(self.layer + 1, "resid_pre") if self.point == "resid_post" else self


def check_point(point: str) -> str:
    """`point`, which must be one of POINTS: ValueError otherwise."""
    return choice(point, "point", POINTS)


def parse_layers(layers: Layers, n_layers: int) -> list[int]:
    """Block numbers in order.

    layers: "all", a text such as "0-3,8,-1", one number or several. Raises ValueError naming what
    is no number, does not exist or is given twice.
    """
    if isinstance(layers, str):
        numbers = list(range(n_layers)) if layers == "all" else _parse_ranges(layers, n_layers)
    else:
        numbers = integers(layers, "layers")
    for number in numbers:
        if not -n_layers <= number < n_layers:
            raise ValueError(
                f"layer {number} does not exist: the model has layers 0 to {n_layers - 1}"
            )
    if not numbers:
        raise ValueError("no layer is given")
    found = sorted(number % n_layers for number in numbers)
    for first, second in pairwise(found):
        if first == second:
            raise ValueError(f"layer {first} is given twice")
    return found


def _parse_ranges(text: str, n_layers: int) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(-?\d+))?\s*", part)
        if match is None:
            raise ValueError(f"layers {text!r} cannot be read: write all, or e.g. 0-3,8,-1")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if match[2] is not None:
            first, last = (number % n_layers if number < 0 else number for number in (first, last))
            if last < first:
                raise ValueError(f"layers {part.strip()} runs backwards")
        numbers += range(first, last + 1) if last < n_layers else [last]
    return numbers

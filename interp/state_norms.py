"""Norms of the states that vectors are made from: their means, and states far from the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine.tap_names import tap_name
from ..model.points import Tap
from .pair_states import read_span
from .prompts import PairIds

OUTLIER = 10.0  # times the median norm
TokenText = Callable[[int], str]


class _Side(NamedTuple):
    pair: int  # its index
    side: int  # 0 the matching one
    norms: Tensor  # [n, P] float64, of the positions that are read


class StateNorms:
    """L2 norms of states at P taps, text by text."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps
        self._sides: list[_Side] = []

    def add(self, pair: int, sides: Sequence[Tensor]) -> None:
        """Take in the states [n, P, d] of either side of a pair, given by its index."""
        for side, states in enumerate(sides):
            norms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float64)
            self._sides.append(_Side(pair, side, norms.cpu()))

    def means(self) -> list[float]:
        """The mean norm at each tap: over a text's positions, then over the texts."""
        return torch.stack([each.norms.mean(0) for each in self._sides]).mean(0).tolist()

    def warning(self, encoded: Sequence[PairIds], at: str, text_of: TokenText) -> str | None:
        """One line on the position whose norm is the most times the median of its tap.

        None where none is over OUTLIER times. encoded: the pairs by index. text_of(id) names a
        token.
        """
        norms = torch.cat([each.norms for each in self._sides]).numpy()  # [N, P]
        medians = np.median(norms, axis=0)
        times = np.divide(norms, medians, out=np.zeros_like(norms), where=medians > 0)
        row, column = (int(index) for index in np.unravel_index(times.argmax(), times.shape))
        if times[row, column] <= OUTLIER:
            return None
        pair, side, position = self._where(row, encoded, at)
        token = text_of(encoded[pair].sides[side].ids[position])
        others = int((times > OUTLIER).any(1).sum()) - 1
        more = f", and {others} other position{'s' * (others > 1)} likewise" if others else ""
        return (
            f"the state of {tap_name(self.taps[column])} at position {position} ({token!r}) of the "
            f"{('matching', 'other')[side]} text of pair {pair + 1} has {times[row, column]:.0f} "
            f"times the median norm{more}: such a state outweighs the others in a mean"
        )

    def _where(self, row: int, encoded: Sequence[PairIds], at: str) -> tuple[int, int, int]:
        """The pair, the side and the position of a row of all norms."""
        for each in self._sides:
            if row < len(each.norms):
                span = read_span(encoded[each.pair].sides[each.side], at)
                return each.pair, each.side, span[row]
            row -= len(each.norms)
        raise AssertionError("there is no such row")

"""States of ranks that hold parts of one head: compared where they must be equal, or gathered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.collectives import gather_over
from ..parallel.group import Axes


@dataclass(frozen=True)
class StateExchange:
    """The states of ranks that hold other texts and a part of this head."""

    axes: Axes  # along which they are
    counts: tuple[int, ...]  # rows of each of them
    index: int  # of this rank among them

    @classmethod
    def of(
        cls, rows: Tensor, ids: Tensor, axes: Axes, names: tuple[str, ...], data_axes: Sequence[str]
    ) -> StateExchange:
        """Compare what ranks hold, in one small exchange.

        Raises ValueError on every rank where states differ along an axis of equal texts.
        """
        named = list(zip(axes, names, strict=True))
        split = tuple(axis for axis, name in named if name in data_axes)
        same = tuple(axis for axis, name in named if name not in data_axes)
        if not any(axis.size > 1 for axis in axes):
            return cls((), (len(rows),), 0)
        odd_numbers = 2 * torch.arange(len(rows), device=rows.device) + 1
        mark = ((_marks(rows) + _marks(ids[:, None])) * odd_numbers).sum()
        sent = torch.stack((mark.new_tensor(len(rows)), mark))
        n_same = math.prod(axis.size for axis in same)
        found = gather_over(sent, split + same).cpu().unflatten(0, (-1, n_same))
        if not (found == found[:, :1]).all():
            raise ValueError(
                "ranks that hold parts of one head must read the same states, and these differ: "
                "gather what sequence parallelism has split, or name data_axes"
            )
        index = 0
        for axis in split:
            index = index * axis.size + axis.rank
        return cls(split, tuple(found[:, 0, 0].tolist()), index)

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all; a rank with fewer adds zeros."""
        if not self.axes:
            return rows
        padded = rows.new_zeros(max(self.counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return gather_over(padded, self.axes).flatten(0, 1)

    def mine(self, count: int) -> slice:
        """This rank's rows among them."""
        start = self.index * max(self.counts) if self.axes else 0
        return slice(start, start + count)


def _marks(rows: Tensor) -> Tensor:
    """A number [R] for the bits of each row, to compare rows of ranks by."""
    if rows.numel() == 0:
        return rows.new_zeros(len(rows), dtype=torch.int64)
    return torch.hash_tensor(rows, 1).view(torch.int64)

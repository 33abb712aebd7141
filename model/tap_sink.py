"""How a forward pass lets its states be read: it hands them to a `TapSink` on the way."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .points import Tap


class TapSink:
    """The receiver of a forward pass's states. This one keeps none.

    The pass asks `into` for memory before it forms a state, so that a kernel can write it there
    directly, and hands the state to `read` afterwards. Taps are canonical: see `Tap.canonical`.
    """

    def into(self, tap: Tap) -> Tensor | None:
        """Memory [B, T, d] for the residual that is about to be formed at `tap`."""
        return None

    def read(self, tap: Tap, x: Tensor) -> None:
        """The state x [B, T, d] at `tap`."""


class BothSinks(TapSink):
    """Hands states to one sink, which may give memory for them, and to another."""

    def __init__(self, first: TapSink, second: TapSink) -> None:
        self._first, self._second = first, second

    def into(self, tap: Tap) -> Tensor | None:
        return self._first.into(tap)

    def read(self, tap: Tap, x: Tensor) -> None:
        self._first.read(tap, x)
        self._second.read(tap, x)


NO_TAPS = TapSink()


class RowTaps(TapSink):
    """Copies `taps` of chosen rows into one buffer, `states` [N, P, d].

    `rows` [N] int64 indexes the flattened [B * T] tokens of the pass. Copies, because a view of
    the last position would keep the whole pass's activations alive.
    """

    def __init__(self, taps: Sequence[Tap], rows: Tensor, d: int, *, dtype: torch.dtype) -> None:
        self._states = torch.empty(rows.shape[0], len(taps), d, dtype=dtype, device=rows.device)
        self._rows = rows
        self._columns = columns_of(taps)
        self._missing = set(self._columns)

    def read(self, tap: Tap, x: Tensor) -> None:
        for column in self._columns.get(tap, ()):
            self._states[:, column] = x.detach().reshape(-1, x.shape[-1])[self._rows]
        self._missing.discard(tap)

    @property
    def states(self) -> Tensor:
        """[N, P, d]. Raises ValueError naming a tap of which the pass handed over no state."""
        check_read(self._missing)
        return self._states


class TapBuffer(TapSink):
    """Takes `taps` of a decode step, one token per request, into `states` [B, P, d].

    Residuals are written there by the kernel that forms them; other points are copied.
    """

    def __init__(self, taps: Sequence[Tap], states: Tensor) -> None:
        self.states = states
        self._columns = columns_of(taps)
        self._missing = set(self._columns)

    def into(self, tap: Tap) -> Tensor | None:
        columns = self._columns.get(tap)
        return None if columns is None else self.states[:, columns[0] : columns[0] + 1]

    def read(self, tap: Tap, x: Tensor) -> None:
        for column in self._columns.get(tap, ()):
            target = self.states[:, column : column + 1]
            if target.data_ptr() != x.data_ptr():
                target.copy_(x)
        if self._missing:  # until the first pass is through
            self._missing.discard(tap)

    def check(self) -> None:
        """Raise ValueError naming a tap of which no pass handed over a state."""
        check_read(self._missing)


def check_read(missing: Collection[Tap]) -> None:
    """Raise ValueError for taps that were asked for and not read, naming the first."""
    if missing:
        layer, point = min(missing, key=str)
        raise ValueError(
            f"no state was read at {point} of layer {layer}: a tap is an integer layer of the "
            "model and one of POINTS"
        )


def columns_of(taps: Sequence[Tap]) -> dict[Tap, list[int]]:
    """The columns of a buffer that hold each state: two taps may name the same state."""
    columns: dict[Tap, list[int]] = {}
    for index, tap in enumerate(taps):
        columns.setdefault(tap.canonical, []).append(index)
    return columns

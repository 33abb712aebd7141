"""How a forward pass lets its states be read: it offers them to an `Access` on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .points import Tap


class Access:
    """What a forward pass offers its states to. This one takes nothing.

    The pass asks `into` for memory before it forms a state, so that a kernel can write it there
    at once, and offers the state to `read` afterwards. Places are canonical: see `Tap.place`.
    """

    def into(self, place: Tap) -> Tensor | None:
        """Memory [B, T, d] for the residual that is about to be formed at `place`."""
        return None

    def read(self, place: Tap, x: Tensor) -> None:
        """The state x [B, T, d] at `place`."""


NO_ACCESS = Access()


class Capture(Access):
    """Copies `taps` of chosen rows into one buffer, `states` [N, P, d].

    `rows` [N] int64 indexes the flattened [B * T] tokens of the pass. Copies, because a view of
    the last position would keep the whole pass's activations alive.
    """

    def __init__(self, taps: Sequence[Tap], rows: Tensor, d: int, *, dtype: torch.dtype) -> None:
        self.states = torch.empty(rows.shape[0], len(taps), d, dtype=dtype, device=rows.device)
        self._rows = rows
        self._slots = slots_of(taps)

    def read(self, place: Tap, x: Tensor) -> None:
        for slot in self._slots.get(place, ()):
            self.states[:, slot] = x.detach().reshape(-1, x.shape[-1])[self._rows]


class TapBuffer(Access):
    """Takes `taps` of a decode step, one token a request, into `states` [B, P, d].

    Residuals are written there by the kernel that forms them; other points are copied.
    """

    def __init__(self, taps: Sequence[Tap], states: Tensor) -> None:
        self.states = states
        self._slots = slots_of(taps)

    def into(self, place: Tap) -> Tensor | None:
        slots = self._slots.get(place)
        return None if slots is None else self.states[:, slots[0] : slots[0] + 1]

    def read(self, place: Tap, x: Tensor) -> None:
        for slot in self._slots.get(place, ()):
            target = self.states[:, slot : slot + 1]
            if target.data_ptr() != x.data_ptr():
                target.copy_(x)


def slots_of(taps: Sequence[Tap]) -> dict[Tap, list[int]]:
    """Where the taps of each place lie in a buffer: two taps may name one place."""
    slots: dict[Tap, list[int]] = {}
    for index, tap in enumerate(taps):
        slots.setdefault(tap.place, []).append(index)
    return slots

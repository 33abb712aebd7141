"""Copies of hidden states taken while a forward pass runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# In the order in which data passes through a block.
POINTS = ("resid_pre", "attn_norm", "attn_out", "resid_mid", "mlp_norm", "mlp_out", "resid_post")


class Tap(NamedTuple):
    """A place to read: a point (one of POINTS) of block `layer`."""

    layer: int
    point: str


class Capture:
    """Copies `taps` of chosen rows into one buffer, `states` [N, P, d].

    `rows` [N] int64 indexes the flattened [B * T] tokens of the pass. Copies, because a view of
    the last position would keep the whole pass's activations alive.
    """

    def __init__(self, taps: Sequence[Tap], rows: Tensor, d: int, *, dtype: torch.dtype) -> None:
        self.states = torch.empty(rows.shape[0], len(taps), d, dtype=dtype, device=rows.device)
        self._rows = rows
        self._slot = {tap: index for index, tap in enumerate(taps)}

    def __call__(self, layer: int, point: str, x: Tensor) -> None:
        """Offer x [B, T, d]; it is copied if this place is tapped."""
        slot = self._slot.get(Tap(layer, point))
        if slot is not None:
            self.states[:, slot] = x.detach().reshape(-1, x.shape[-1])[self._rows]


def no_capture(layer: int, point: str, x: Tensor) -> None:
    """Stands where nothing is tapped."""

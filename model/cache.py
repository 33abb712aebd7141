"""Keys and values of the positions seen so far, in buffers of fixed size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Static cache of `batch` requests of up to `capacity` positions each.

    keys, values: [L, batch, kv_heads_of_this_rank, capacity, head_dim]. Requests may hold
    different numbers of positions: `lengths`. Position t of a request lies at index t, so a
    right-padded chunk may write junk past a request's end: nothing attends to an index above its
    own position, and the position is written again before it is reached.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (n_layers, batch, kv_heads, capacity, head_dim)
        # Zeros, not empty: masked entries still meet a zero weight, and 0 * NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch
        self.capacity = capacity

    def next_positions(self, n_tokens: int) -> Tensor:
        """Absolute positions [batch, n_tokens] of the next tokens of each request."""
        if max(self.lengths) + n_tokens > self.capacity:
            raise ValueError(
                f"{max(self.lengths) + n_tokens} positions do not fit a cache of {self.capacity}"
            )
        starts = torch.tensor(self.lengths, device=self.keys.device)
        return starts[:, None] + torch.arange(n_tokens, device=self.keys.device)

    def advance(self, counts: Sequence[int]) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

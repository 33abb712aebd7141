"""Keys and values of the positions seen so far, in buffers of fixed size."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class KVCache:
    """Static cache of `batch` requests of up to `capacity` positions each.

    keys, values: [L, batch, kv_heads_of_this_rank, capacity, head_dim]. Requests may hold
    different numbers of positions: `lengths` [batch] int64, in device memory, where a captured
    decode step reads and advances it. The host keeps `longest`, an upper bound. Position t of a
    request lies at index t, and nothing attends to an index above its own position, so what a
    right-padded chunk, or an earlier request, left there is written again before it is reached.
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
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.longest = 0

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    def slot(self, slot: int) -> KVCache:
        """An empty cache for one request, in the memory of one slot."""
        part = copy.copy(self)
        part.keys, part.values = (buffer[:, slot : slot + 1] for buffer in (self.keys, self.values))
        part.lengths = self.lengths[slot : slot + 1]
        part.lengths.zero_()
        part.longest = 0
        return part

    def next_positions(self, n_tokens: int) -> Tensor:
        """Absolute positions [batch, n_tokens] of the next tokens of each request."""
        if self.longest + n_tokens > self.capacity:
            raise ValueError(
                f"{self.longest + n_tokens} positions do not fit a cache of {self.capacity}"
            )
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def advance(self, counts: Tensor | int, longest: int) -> None:
        """Every request holds `counts` more positions; `longest` bounds the new lengths."""
        self.lengths += counts
        self.longest = longest

"""Keys and values of the positions seen so far, in buffers of fixed size."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class KVCache:
    """Static cache of `batch` requests of up to `capacity` positions each.

    keys, values: [L, batch, kv_heads_of_this_rank, capacity, head_dim]. Requests may hold
    different numbers of positions: `lengths` [batch] int64, in device memory, where a captured
    decode step reads and moves it. The host keeps `longest`, a bound of them. Position t of a
    request lies at index t, so a right-padded chunk may write junk past a request's end: nothing
    attends to an index above its own position, and it is written again before it is reached.
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

    def first(self, batch: int) -> KVCache:
        """The first `batch` requests, in the same memory."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, :batch], self.values[:, :batch]
        part.lengths = self.lengths[:batch]
        return part

    def reset(self) -> None:
        """Forget everything."""
        for buffer in (self.keys, self.values, self.lengths):
            buffer.zero_()
        self.longest = 0

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

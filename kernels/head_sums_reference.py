"""Sums of a slice's logits, whose bits do not depend on how the ids are cut into blocks.

Every span of ids is summed by itself, from its own maximum, and all spans are merged once at the
end, as the slices of ranks are. With blocks of whole spans, and rows whose products have the same
bits, a row's sums are then the same whatever other rows there are, which decide the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .blocks import HEAD_SPAN_IDS
from .head_types import RowStats

LOWEST = -1e30  # stands for logits of -inf in sums, where 0 * -inf would be NaN


def _span_count(n_ids: int, vocab_block: int) -> int:
    """Number of spans of a slice in blocks of ids: the last span of a block may be short."""
    n_blocks, rest = divmod(n_ids, vocab_block)
    return n_blocks * -(-vocab_block // HEAD_SPAN_IDS) + -(-rest // HEAD_SPAN_IDS)


class SpanSums:
    """Maximum and sums of every span for the rows x: [r, spans] each, of a slice of n_ids."""

    def __init__(self, x: Tensor, n_ids: int, vocab_block: int, rows_per_request: int) -> None:
        self.rows_per_request = rows_per_request
        self.n_added = 0  # spans
        n_rows, n_numbers = x.shape[0], 4 if rows_per_request > 1 else 3
        new = partial(torch.empty, dtype=torch.float32, device=x.device)
        numbers = new(n_numbers, n_rows, _span_count(n_ids, vocab_block))
        self.max, self.sum_exp, self.sum_dev, *self.cross = numbers
        # kept, as memory that is freed after each block may have to be mapped again
        self._scratch = new(n_rows * min(vocab_block, n_ids))

    def note_maxima(self, z: Tensor) -> Tensor:
        """Maxima [r] of the next block's logits z [r, C], which `add` takes after this."""
        for spans, numbers in self._spans(z):
            self.max[:, numbers] = spans.amax(-1)
        return self.max[:, self.n_added : numbers.stop].amax(-1)

    def add(self, z: Tensor) -> None:
        """Sum the logits z [r, C] whose maxima were noted; z is overwritten."""
        z.clamp_(min=LOWEST)
        for spans, numbers in self._spans(z):
            self._add_spans(spans, numbers)
        self.n_added = numbers.stop

    def _spans(self, z: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Views [r, n, HEAD_SPAN_IDS] of a block, and of what is left, with their numbers."""
        start, whole = self.n_added, z.shape[1] // HEAD_SPAN_IDS
        cut = whole * HEAD_SPAN_IDS
        if whole:
            yield z[:, :cut].unflatten(1, (whole, HEAD_SPAN_IDS)), slice(start, start + whole)
        if cut < z.shape[1]:
            yield z[:, None, cut:], slice(start + whole, start + whole + 1)

    def _add_spans(self, z: Tensor, numbers: slice) -> None:
        """Sum the logits z [r, n, C] of the spans with these numbers."""
        base = _finite(self.max[:, numbers])
        for cross in self.cross:
            cross[:, numbers] = self._gaps(z, base)
        dev = z.sub_(base[..., None])
        exp = torch.exp(dev, out=self.scratch(dev.shape))
        self.sum_exp[:, numbers] = exp.sum(-1)
        self.sum_dev[:, numbers] = exp.mul_(dev).sum(-1)

    def _gaps(self, z: Tensor, base: Tensor) -> Tensor:
        """Σ exp(z_f - base_f) · (z_f - z) of each span [r, n]; f is the request's last row."""
        requests = z.unflatten(0, (-1, self.rows_per_request))  # [q, g, n, C]
        last = requests[:, -1]
        last_base = base[self.rows_per_request - 1 :: self.rows_per_request]  # [q, n]
        weight = (last - last_base[..., None]).exp()
        gap = torch.sub(last[:, None], requests, out=self.scratch(requests.shape))
        return gap.mul_(weight[:, None]).sum(-1).flatten(0, 1)

    def scratch(self, shape: torch.Size) -> Tensor:
        """Scratch memory for a block's numbers, valid until `add` is called, which uses it, too."""
        return self._scratch[: shape.numel()].view(shape)

    def merge_into(self, stats: RowStats) -> None:
        """Write the sums over all spans, of which there is at least one."""
        if self.max.shape[1] > 1:
            self._merge()
        stats.max.copy_(self.max[:, 0])
        stats.sum_exp.copy_(self.sum_exp[:, 0])
        stats.sum_dev.copy_(self.sum_dev[:, 0])
        for cross in self.cross:
            stats.cross.copy_(cross[:, 0])

    def _merge(self) -> None:
        """Merge all spans into one, [r, 1]."""
        top = self.max.amax(-1, keepdim=True)
        shift = self.max - _finite(top)
        decay = shift.exp()
        # a span of logits of -inf has shift -inf: 0 * -inf would be NaN
        moved = torch.where(self.sum_exp > 0, self.sum_dev + shift * self.sum_exp, 0)
        self.max = top
        self.sum_exp = (self.sum_exp * decay).sum(-1, keepdim=True)
        self.sum_dev = (moved * decay).sum(-1, keepdim=True)
        last_decay = decay[self.rows_per_request - 1 :: self.rows_per_request, None]  # [q, 1, n]
        requests = [cross.unflatten(0, (-1, self.rows_per_request)) for cross in self.cross]
        self.cross = [(x * last_decay).sum(-1).flatten()[:, None] for x in requests]


def _finite(maxima: Tensor) -> Tensor:
    """Maxima to subtract: 0 where all logits are -inf."""
    return maxima.masked_fill(maxima.isneginf(), 0)

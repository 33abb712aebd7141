"""The head's statistics, streamed so that no tensor of all logits exists: PyTorch reference.

    z = x · Wᵀ                       x [R, d] normed rows, W [Vs, d] this rank's vocabulary slice

Legend: R rows, Vs ids of the slice (global ids first_id ...), k candidates, m row maximum.
Per row, over the slice, in one pass that holds one block of logits at a time:

    logits        the k largest z, ties by the lower id; token_ids: their ids
    max           m = max z
    sum_exp       Σ exp(z - m)
    sum_dev       Σ exp(z - m) · (z - m)           for the entropy
    cross         Σ exp(z_f - m_f) · (z_f - z)     for KL; f is the last row of the row's request
    target_logit  the target's z, 0 where the slice lacks it (to be summed over slices)
    target_rank   how many ids beat the target     (z larger, or equal with a lower id)
    samples       the n best of z + Gumbel         keys, logits and ids

All are float32. Slices of one vocabulary combine exactly: see `parallel/head_reduce.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import (
    HEAD_ROWS,
    WIDENED_IDS,
    head_block_ids,
)
from .few_rows_linear import linear
from .gumbel import gumbel_reference
from .head_sums_reference import SpanSums
from .head_types import HeadOptions, HeadStats, Noise, RowStats, SampleStats, Target
from .top_k_reference import block_best, keep_best


def head_stats_reference(
    x: Tensor,
    weight: Tensor,
    *,
    k: int,
    first_id: int = 0,
    scale: Tensor | None = None,
    target: Target | None = None,
    rows_per_request: int = 1,
    noise: Noise | None = None,
    row_block: int = HEAD_ROWS,
    vocab_block: int | None = None,
) -> HeadStats:
    """`head_stats` as PyTorch operators; shapes and meaning in the module's text.

    Block sizes change speed and memory; by default vocab_block follows from the rows. One that is
    not whole spans of ids (see `head_sums_reference.py`) changes the rounding of the sums, too.
    """
    options = HeadOptions(k, first_id, scale, target, rows_per_request, noise)
    options.check(x, weight)
    return stream_head(x, weight, options, row_block, vocab_block)


@torch.no_grad()
def stream_head(
    x: Tensor,
    weight: Tensor,
    options: HeadOptions,
    row_block: int = HEAD_ROWS,
    vocab_block: int | None = None,
) -> HeadStats:
    """Stream the slice for one block of rows after another, each of whole requests."""
    n_rows, size = x.shape[0], options.rows_per_request
    block = max(1, row_block // size)  # requests
    if vocab_block is None:
        vocab_block = _ids_of_block(min(block * size, n_rows or 1), weight)
    out = HeadStats.empty(n_rows, options, x.device)
    for start in range(0, n_rows // size if weight.shape[0] else 0, block):
        requests = slice(start, min(n_rows // size, start + block))
        rows = slice(requests.start * size, requests.stop * size)
        samples = None if out.samples is None else out.samples.requests(requests)
        block_x = x[rows] if x.is_cuda else x[rows].float()  # once, not once per block of ids
        sums = SpanSums(block_x, weight.shape[0], vocab_block, size)
        part = _RowBlock(out.rows.rows(rows), samples, sums, options.for_requests(requests))
        for low in range(0, weight.shape[0], vocab_block):
            part.add(float_logits(block_x, weight[low : low + vocab_block]), low)
        sums.merge_into(part.stats)
    return out


def _ids_of_block(n_rows: int, weight: Tensor) -> int:
    ids = head_block_ids(n_rows)
    return ids if weight.dtype == torch.float32 else min(WIDENED_IDS, ids)


def float_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, d] · weight [C, d]ᵀ with float32 sums and a float32 result [R, C].

    Half-precision products rounded to half precision would tie and re-order the top-k. On CPU
    no torch operator multiplies bf16 into float32, and oneDNN's rounding of float32 operands is
    a flag of the whole process. So W is widened block by block: 1 / R of the product's work.
    """
    if x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return linear(x.float(), weight.float())


@dataclass
class _RowBlock:
    """Running statistics of one block of rows, updated in place block of ids by block of ids."""

    stats: RowStats
    samples: SampleStats | None
    sums: SpanSums
    options: HeadOptions

    def add(self, z: Tensor, low: int) -> None:
        """Take in products z [r, C] of local ids low, low + 1, ...; z is overwritten."""
        options = self.options
        if options.scale is not None:
            z.mul_(options.scale[:, None])
        first_id = options.first_id + low
        self._update_top_k(z, self.sums.note_maxima(z), first_id)
        if options.target is not None:
            count = _count_above(z, first_id, options.target, self.sums.scratch(z.shape))
            self.stats.target_rank.add_(count)
            self.stats.target_logit.add_(_at_target(z, first_id, options.target))
        if options.noise is not None and options.noise.seed.numel():
            sampled = options.noise.sampled(z, options.rows_per_request)
            self._update_samples(sampled, options.noise, first_id)
        self.sums.add(z)

    def _update_top_k(self, z: Tensor, block_max: Tensor, first_id: int) -> None:
        """Update the top-k of the rows that this block changes: soon few, as the k-th rises.

        A tie with the k-th changes nothing: the block's ids are higher.
        """
        logits, ids = self.stats.logits, self.stats.token_ids
        rows = (~(block_max[:, None] <= logits[:, -1:]).all(-1)).nonzero()[:, 0]
        if rows.numel():
            changed = z
            if rows.numel() < z.shape[0]:
                room = self.sums.scratch(torch.Size((rows.numel(), z.shape[1])))
                changed = torch.index_select(z, 0, rows, out=room)
            new_logits, columns = block_best(changed, min(logits.shape[1], z.shape[1]))
            best = logits[rows], ids[rows]
            keep_best(best, (new_logits, columns + first_id))
            logits[rows], ids[rows] = best

    def _update_samples(self, z: Tensor, noise: Noise, first_id: int) -> None:
        samples = self.samples
        assert samples is not None
        ids = torch.arange(first_id, first_id + z.shape[1], device=z.device)
        keys = z + gumbel_reference(noise.seed[:, None], noise.step[:, None], ids[None])
        best_keys, columns = block_best(keys, min(noise.n_best, z.shape[1]))
        keep_best(
            (samples.keys, samples.token_ids, samples.logits),
            (best_keys, columns + first_id, z.gather(1, columns)),
        )


def _count_above(z: Tensor, first_id: int, target: Target, scratch: Tensor) -> Tensor:
    ids = torch.arange(first_id, first_id + z.shape[1], device=z.device)
    low, high = target.logits - target.slack, target.logits + target.slack
    target_ids = target.ids[:, None]
    beats = ids < target_ids
    beats &= z >= low[:, None]
    beats |= z > high[:, None]
    beats &= ids != target_ids
    # summing bools would copy them as int64; a block's count is exact in float32, too
    return scratch.copy_(beats).sum(-1).long()


def _at_target(z: Tensor, first_id: int, target: Target) -> Tensor:
    local = target.ids - first_id
    is_here = (local >= 0) & (local < z.shape[1])
    return z.gather(1, local.where(is_here, 0)[:, None])[:, 0].where(is_here, 0)


def mass_above_reference(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    logsumexp: Tensor,
    first_id: int = 0,
    vocab_block: int = WIDENED_IDS,
) -> Tensor:
    """Σ exp(z - logsumexp) over the slice's ids that beat each of n candidates: [B, n] float32.

    z = scale · (x · Wᵀ); logits, token_ids [B, n] of the candidates; logsumexp [B].
    """
    mass = torch.zeros_like(logits)
    logits, token_ids = logits[..., None], token_ids[..., None]  # [B, n, 1]
    for low in range(0, weight.shape[0], vocab_block):
        z = float_logits(x, weight[low : low + vocab_block]).mul_(scale[:, None])[:, None]
        ids = torch.arange(first_id + low, first_id + low + z.shape[-1], device=z.device)
        beats = (z > logits) | ((z == logits) & (ids < token_ids))  # [B, n, C]
        # its own logit here may differ by rounding from the candidate's, if a kernel made that
        beats &= ids != token_ids
        mass += ((z - logsumexp[:, None, None]).exp() * beats).sum(-1)
    return mass

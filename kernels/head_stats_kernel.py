"""The head's statistics as Triton kernels: no tensor of logits exists, not even of one block.

A piece of work is one tile of rows and one share of the slice's ids; as many programs as run at
once each do one piece after another (see `head_cut.py`). A piece walks its share tile by tile:
z = x · Wᵀ in float32, then the running statistics of `head_stats_reference`; z is discarded. A
second kernel merges the shares. Legend: BR rows and BV ids of a tile, BD columns of x and W per
step of the product, BP ids of a part that is looked at, S shares.

KL needs the logits of each request's last row beside each row's own: tiles hold whole requests, and
the last row is read from the tile.
"""

from __future__ import annotations

import torch

from .gumbel import gumbel_kernel
from .top_k_kernel import clear_slots, keep_best, merge_sorted, sort_slots
from .triton_shim import tl, triton

# Sums of a row over a share, in the order in which the main kernel writes them.
N_SUMS = 6
_N_SUMS = tl.constexpr(N_SUMS)


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 as three products of tf32, which lose no digits of it."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def load_step(x, w, row, id_, inside, column, d, x_stride, w_stride, EVEN_D: tl.constexpr):
    """Columns [BD] of rows of x [BR, BD], 0 where a row is not inside, and of W [BV, BD]."""
    x_pointers = x + row[:, None] * x_stride + column[None, :]
    w_pointers = w + id_[:, None] * w_stride + column[None, :]
    if EVEN_D:
        return tl.load(x_pointers, mask=inside[:, None], other=0), tl.load(w_pointers)
    else:
        in_d = (column < d)[None, :]
        a = tl.load(x_pointers, mask=inside[:, None] & in_d, other=0)
        return a, tl.load(w_pointers, mask=in_d, other=0)


@triton.jit
def head_kernel(
    x,  # [R, d], or its descriptor
    w,  # [Vs, d], or its descriptor
    scale,  # [R]
    target_ids, target_low, target_high,  # [R] local id, tie bounds
    seed, step,  # [B]
    part_logits, part_ids,  # [S, R, K2]
    part_sums,  # [S, R, N_SUMS]
    sample_keys, sample_ids, sample_logits,  # [S, B, N2]
    tiles,  # [programs, BR, BV // HALVES]
    n_rows, n_ids, d, x_stride, w_stride,
    n_work, share, tile_rows, row_tiles, rows_per_request, n_samples, sample_row, first_id,
    K: tl.constexpr, K2: tl.constexpr, N: tl.constexpr, N2: tl.constexpr, BB: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, HALVES: tl.constexpr,
    EVEN_D: tl.constexpr, BULK: tl.constexpr, SCALED: tl.constexpr,
    TARGET: tl.constexpr, KL: tl.constexpr, NOISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for work in range(tl.program_id(0), n_work, tl.num_programs(0)):
        tile, part = work % row_tiles, work // row_tiles
        first_row = tile * tile_rows
        slot = tl.arange(0, BR)
        row = first_row + slot
        inside = (slot < tile_rows) & (row < n_rows)
        row = tl.minimum(row, n_rows - 1).to(tl.int64)
        start, stop = part * share, tl.minimum(n_ids, (part + 1) * share)
        WIDTH: tl.constexpr = BV // HALVES
        scratch = tiles + tl.program_id(0).to(tl.int64) * BR * WIDTH
        out = part.to(tl.int64) * n_rows + row
        kept = out[:, None] * K2 + tl.arange(0, K2)[None, :]
        clear_slots(part_logits + kept, part_ids + kept, inside, BR, K, K2)
        first_slot = slot // rows_per_request * rows_per_request
        reference = tl.minimum(first_slot + rows_per_request - 1, BR - 1)

        factor = tl.full([BR], 1.0, tl.float32)
        if SCALED:
            factor *= tl.load(scale + row)
        if NOISE:
            sample = tl.arange(0, BB)
            is_sampled = sample < n_samples
            sampled_slot = tl.minimum(sample * rows_per_request + sample_row, BR - 1)
            sample_out = part.to(tl.int64) * n_samples + sample
            kept_key = sample_out[:, None] * N2 + tl.arange(0, N2)[None, :]
            clear_slots(sample_keys + kept_key, sample_ids + kept_key, is_sampled, BB, N, N2)
            worst_key = tl.full([BB], float("-inf"), tl.float32)

        m = tl.full([BR], float("-inf"), tl.float32)
        sum_exp = tl.zeros([BR], tl.float32)
        sum_dev, beaten_by, cross, logit = sum_exp, sum_exp, sum_exp, sum_exp
        worst = tl.where(inside, m, float("inf"))
        for begin in range(start, stop, BV):
            id_ = tl.minimum(begin + tl.arange(0, BV), stop - 1).to(tl.int64)
            acc = tl.zeros([BR, BV], tl.float32)
            for first in range(0, d, BD):
                column = first + tl.arange(0, BD)
                if BULK:
                    a = x.load([first_row, first])
                    b = w.load([begin, first])
                else:
                    a, b = load_step(x, w, row, id_, inside, column, d, x_stride, w_stride, EVEN_D)
                acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
            # The tile goes through memory that stays in cache, and is reduced in narrow parts: with
            # all the statistics at once, it does not fit the registers.
            for half in tl.static_range(HALVES):
                if HALVES == 1:
                    tile_half = acc
                else:
                    halves = tl.permute(tl.reshape(acc, [BR, 2, WIDTH]), [0, 2, 1])
                    left, right = tl.split(halves)
                    tile_half = left if half == 0 else right
                tl.debug_barrier()
                tl.store(scratch + slot[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], tile_half)
                tl.debug_barrier()
                for first in range(0, WIDTH, BP):
                    offset = first + tl.arange(0, BP)
                    column_id = begin + half * WIDTH + offset
                    valid = (column_id < stop)[None, :]
                    z = tl.load(scratch + slot[:, None] * WIDTH + offset[None, :]) * factor[:, None]
                    z = tl.where(valid, z, float("-inf"))
                    new_m = tl.maximum(m, tl.max(z, 1))
                    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # as long as all are -inf
                    shift = m - base
                    decay = tl.exp(shift)
                    sum_dev = tl.where(sum_exp > 0, sum_dev + shift * sum_exp, 0.0) * decay
                    if KL:
                        z_ref = tl.load(scratch + reference[:, None] * WIDTH + offset[None, :])
                        z_ref *= tl.gather(factor, reference, 0)[:, None]
                        weight = tl.exp(z_ref - tl.gather(base, reference, 0)[:, None])
                        gap = tl.where(valid & (weight != 0), weight * (z_ref - z), 0.0)
                        cross = cross * tl.gather(decay, reference, 0) + tl.sum(gap, 1)
                    dev = z - base[:, None]
                    exp = tl.exp(dev)
                    sum_exp = sum_exp * decay + tl.sum(exp, 1)
                    sum_dev += tl.sum(tl.where(exp == 0, 0.0, exp * dev), 1)
                    m = new_m
                    if TARGET:
                        target = tl.load(target_ids + row)[:, None]
                        low, high = tl.load(target_low + row), tl.load(target_high + row)
                        is_target = column_id[None, :] == target
                        tied_before = (z >= low[:, None]) & (column_id[None, :] < target)
                        beats = ((z > high[:, None]) | tied_before) & (is_target == 0) & valid
                        beaten_by += tl.sum(beats.to(tl.float32), 1)
                        logit += tl.sum(tl.where(is_target & valid, z, 0.0), 1)
                    if NOISE:
                        pointers = scratch + sampled_slot[:, None] * WIDTH + offset[None, :]
                        z_sample = tl.load(pointers) * tl.gather(factor, sampled_slot, 0)[:, None]
                        seeds = tl.load(seed + sample, mask=is_sampled, other=0)
                        steps = tl.load(step + sample, mask=is_sampled, other=0)
                        noise = gumbel_kernel(seeds, steps, first_id + column_id.to(tl.int64))
                        is_key = valid & is_sampled[:, None]
                        keys = tl.where(is_key, z_sample + noise, float("-inf"))
                        worst_key = keep_best(
                            keys, z_sample, worst_key, column_id, sample_keys + kept_key,
                            sample_ids + kept_key, sample_logits + kept_key, is_sampled, True,
                        )  # fmt: skip
                    worst = keep_best(
                        z, z, worst, column_id, part_logits + kept, part_ids + kept, part_logits,
                        inside, False,
                    )  # fmt: skip

        sums = part_sums + out * _N_SUMS
        tl.store(sums, m, mask=inside)
        tl.store(sums + 1, sum_exp, mask=inside)
        tl.store(sums + 2, sum_dev, mask=inside)
        tl.store(sums + 3, beaten_by, mask=inside)
        tl.store(sums + 4, cross, mask=inside)
        tl.store(sums + 5, logit, mask=inside)
        sort_slots(part_logits + kept, part_ids + kept, part_logits, inside, K, K2, False)
        if NOISE:
            sort_slots(
                sample_keys + kept_key, sample_ids + kept_key, sample_logits + kept_key,
                is_sampled, N, N2, True,
            )  # fmt: skip


@triton.jit
def merge_kernel(
    part_logits, part_ids, part_sums, part_sample_keys, part_sample_ids, part_sample_logits,
    token_ids, logits, m, sum_exp, sum_dev, cross, target_logit, target_rank,
    sample_ids, sample_logits, sample_keys,
    n_rows, n_samples, n_parts, rows_per_request, first_id,
    K: tl.constexpr, K2: tl.constexpr, N: tl.constexpr, N2: tl.constexpr, S2: tl.constexpr,
    NOISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, S2)
    is_part = part < n_parts
    sums = part_sums + (part.to(tl.int64) * n_rows + row) * _N_SUMS
    part_m = tl.load(sums, mask=is_part, other=float("-inf"))
    part_exp = tl.load(sums + 1, mask=is_part, other=0)
    part_dev = tl.load(sums + 2, mask=is_part, other=0)
    top = tl.max(part_m, 0)
    shift = part_m - tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp(shift)
    tl.store(m + row, top)
    tl.store(sum_exp + row, tl.sum(part_exp * decay, 0))
    moved = tl.where(part_exp > 0, part_dev + shift * part_exp, 0.0)
    tl.store(sum_dev + row, tl.sum(moved * decay, 0))
    counts = tl.load(sums + 3, mask=is_part, other=0)
    tl.store(target_rank + row, tl.sum(counts, 0).to(tl.int64))
    reference = row // rows_per_request * rows_per_request + rows_per_request - 1
    reference_sums = part_sums + (part.to(tl.int64) * n_rows + reference) * _N_SUMS
    ref_m = tl.load(reference_sums, mask=is_part, other=float("-inf"))
    ref_top = tl.max(ref_m, 0)
    ref_shift = ref_m - tl.where(ref_top == float("-inf"), 0.0, ref_top)
    part_cross = tl.load(sums + 4, mask=is_part, other=0)
    tl.store(cross + row, tl.sum(part_cross * tl.exp(ref_shift), 0))
    tl.store(target_logit + row, tl.sum(tl.load(sums + 5, mask=is_part, other=0), 0))
    merge_sorted(
        part_logits, part_ids, part_logits, logits, token_ids, logits, row, n_rows, n_parts,
        first_id, K, K2, S2, False,
    )  # fmt: skip
    if NOISE:  # noqa: SIM102 - without noise nothing in here is compiled
        if row < n_samples:
            merge_sorted(
                part_sample_keys, part_sample_ids, part_sample_logits,
                sample_keys, sample_ids, sample_logits,
                row, n_samples, n_parts, first_id, N, N2, S2, True,
            )  # fmt: skip

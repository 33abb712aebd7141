"""The head's statistics as Triton kernels: no tensor of logits exists, not even of one block.

A piece of work is one tile of rows and one share of the slice's ids; as many programs as run at
once each do one piece after another (see `head_cut.py`). A piece walks its share tile by tile:
z = x · Wᵀ in float32, then the running statistics of `head_stats_reference`, and z is gone. A
second kernel merges the shares. Legend: BR rows and BV ids of a tile, BD columns of x and W per
step of the product, BP ids of a part that is looked at, S shares.

Candidates for the top-k are kept unsorted, in memory that the caches hold. A part costs one
comparison of its row maxima with the rows' worst candidates; only while some row's maximum beats
its worst is the best id taken out of the part and put in that one's slot. Shares are walked in the
order of ids, and ties within a part taken lowest id first, so a tie never replaces a candidate,
which leaves the lower id.

KL needs the logits of each request's last row beside each row's own: tiles hold whole requests, and
the last row is read from the tile.
"""

from __future__ import annotations

import torch

from .triton_shim import tl, triton

_NO_ID = tl.constexpr(2**31 - 1)
# Sums of a row over a share, in the order in which the main kernel writes them.
N_SUMS = 6
_N_SUMS = tl.constexpr(N_SUMS)


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 as three products of tf32, which lose no digits of it."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def _gumbel(seed, step, ids):
    """Noise [BB, BV] as in `gumbel_reference`: seed, step [BB] int64, ids [BV] int64."""
    zeros = tl.zeros([seed.shape[0], ids.shape[0]], tl.uint32)
    c0 = zeros + ids.to(tl.uint32)[None, :]
    c1 = zeros + step.to(tl.uint32)[:, None]
    low = zeros + (seed & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = zeros + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    bits, _, _, _ = tl.philox_impl(c0, c1, zeros, zeros, low, high)
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # -log1p(-v): by its series where log(1 - v) would lose v's digits
    series = v * 0 + 1 / 13
    for power in tl.static_range(12):
        series = series * v + 1 / (12 - power)
    t = tl.where(v < 0.25, v * series, -tl.log(1 - v))
    return -tl.log(t)


@triton.jit
def _keep_best(
    z, payload, worst, column, kept_values, kept_ids, kept_payload, inside, PAYLOAD: tl.constexpr
):
    """Merge a tile z [BR, BV] of ids column [BV] into the candidates kept in memory [BR, K2].

    worst [BR]: the rows' worst candidate; the new one is returned. kept_*: pointers [BR, K2]. With
    PAYLOAD, kept_payload gets the numbers of `payload` [BR, BV] at each candidate.
    """
    top = tl.max(z, 1)
    if tl.max((top > worst).to(tl.int32), 0) > 0:
        tl.debug_barrier()  # what other threads kept for the last tile is in memory
        values = tl.load(kept_values, mask=inside[:, None], other=float("inf"))
        ids = tl.load(kept_ids, mask=inside[:, None], other=0)
        carried = values
        if PAYLOAD:
            carried = tl.load(kept_payload, mask=inside[:, None], other=0)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            beats = top > worst
            best = tl.min(tl.where(z == top[:, None], column[None, :], _NO_ID), 1)
            is_worst = values == worst[:, None]
            # empty slots hold distinct negative ids, so that one slot is taken at a time
            last = tl.max(tl.where(is_worst, ids, -_NO_ID), 1)
            is_slot = is_worst & (ids == last[:, None]) & beats[:, None]
            taken = (column[None, :] == best[:, None]) & beats[:, None]
            if PAYLOAD:
                value = tl.sum(tl.where(taken, payload, 0.0), 1)
                carried = tl.where(is_slot, value[:, None], carried)
            values = tl.where(is_slot, top[:, None], values)
            ids = tl.where(is_slot, best[:, None], ids)
            z = tl.where(taken, float("-inf"), z)
            worst, top = tl.min(values, 1), tl.max(z, 1)
        tl.store(kept_values, values, mask=inside[:, None])
        tl.store(kept_ids, ids, mask=inside[:, None])
        if PAYLOAD:
            tl.store(kept_payload, carried, mask=inside[:, None])
    return worst


@triton.jit
def _clear_slots(
    kept_values, kept_ids, inside, BR: tl.constexpr, K: tl.constexpr, K2: tl.constexpr
):
    """Empty slots: value -inf; those beyond K hold +inf and are never taken."""
    slot = tl.arange(0, K2)[None, :] + tl.zeros([BR, 1], tl.int32)
    value = tl.where(slot < K, float("-inf"), float("inf"))
    tl.store(kept_values, value, mask=inside[:, None])
    tl.store(kept_ids, -1 - slot, mask=inside[:, None])


@triton.jit
def _sort_slots(
    kept_values, kept_ids, kept_payload, inside, K: tl.constexpr, K2: tl.constexpr,
    PAYLOAD: tl.constexpr,
):  # fmt: skip
    """Put candidates in order, best first, ties by the lower id; -1 where there is none."""
    tl.debug_barrier()
    slot = tl.arange(0, K2)[None, :]
    values = tl.load(kept_values, mask=inside[:, None] & (slot < K), other=float("-inf"))
    ids = tl.load(kept_ids, mask=inside[:, None], other=-1)
    carried = values
    if PAYLOAD:
        carried = tl.load(kept_payload, mask=inside[:, None], other=0)
    tl.debug_barrier()
    sorted_values, sorted_ids, sorted_carried = values, ids, carried
    for at in range(K):
        top = tl.max(values, 1)
        best = tl.min(tl.where((values == top[:, None]) & (ids >= 0), ids, _NO_ID), 1)
        taken, here = ids == best[:, None], slot == at
        found = tl.where(best == _NO_ID, -1, best)
        sorted_values = tl.where(here, top[:, None], sorted_values)
        sorted_ids = tl.where(here, found[:, None], sorted_ids)
        if PAYLOAD:
            value = tl.sum(tl.where(taken, carried, 0.0), 1)
            sorted_carried = tl.where(here, value[:, None], sorted_carried)
        values = tl.where(taken, float("-inf"), values)
        ids = tl.where(taken, -1, ids)
    tl.store(kept_values, sorted_values, mask=inside[:, None])
    tl.store(kept_ids, sorted_ids, mask=inside[:, None])
    if PAYLOAD:
        tl.store(kept_payload, sorted_carried, mask=inside[:, None])


@triton.jit
def load_step(x, w, row, id_, inside, column, d, x_stride, w_stride, EVEN_D: tl.constexpr):
    """Columns [BD] of rows of x [BR, BD], 0 where a row is not inside, and of W [BV, BD]."""
    at_x = x + row[:, None] * x_stride + column[None, :]
    at_w = w + id_[:, None] * w_stride + column[None, :]
    if EVEN_D:
        return tl.load(at_x, mask=inside[:, None], other=0), tl.load(at_w)
    else:
        in_d = (column < d)[None, :]
        a = tl.load(at_x, mask=inside[:, None] & in_d, other=0)
        return a, tl.load(at_w, mask=in_d, other=0)


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
    TARGET: tl.constexpr, GROUPED: tl.constexpr, NOISE: tl.constexpr, PRECISION: tl.constexpr,
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
        _clear_slots(part_logits + kept, part_ids + kept, inside, BR, K, K2)
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
            _clear_slots(sample_keys + kept_key, sample_ids + kept_key, is_sampled, BB, N, N2)
            worst_key = tl.full([BB], float("-inf"), tl.float32)

        m = tl.full([BR], float("-inf"), tl.float32)
        sum_exp = tl.zeros([BR], tl.float32)
        sum_dev, beaten_by, cross, logit = sum_exp, sum_exp, sum_exp, sum_exp
        worst = tl.where(inside, m, float("inf"))
        for begin in range(start, stop, BV):
            id_ = tl.minimum(begin + tl.arange(0, BV), stop - 1).to(tl.int64)
            acc = tl.zeros([BR, BV], tl.float32)
            for at in range(0, d, BD):
                column = at + tl.arange(0, BD)
                if BULK:
                    a = x.load([first_row, at])
                    b = w.load([begin, at])
                else:
                    a, b = load_step(x, w, row, id_, inside, column, d, x_stride, w_stride, EVEN_D)
                acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
            # The tile goes through memory that the caches hold and is looked at in narrow parts:
            # with all that is asked of it, it does not fit the registers.
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
                for at in range(0, WIDTH, BP):
                    offset = at + tl.arange(0, BP)
                    column_id = begin + half * WIDTH + offset
                    valid = (column_id < stop)[None, :]
                    z = tl.load(scratch + slot[:, None] * WIDTH + offset[None, :]) * factor[:, None]
                    z = tl.where(valid, z, float("-inf"))
                    new_m = tl.maximum(m, tl.max(z, 1))
                    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # as long as all are -inf
                    shift = m - base
                    decay = tl.exp(shift)
                    sum_dev = tl.where(sum_exp > 0, sum_dev + shift * sum_exp, 0.0) * decay
                    if GROUPED:
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
                        at_sample = scratch + sampled_slot[:, None] * WIDTH + offset[None, :]
                        z_sample = tl.load(at_sample) * tl.gather(factor, sampled_slot, 0)[:, None]
                        seeds = tl.load(seed + sample, mask=is_sampled, other=0)
                        steps = tl.load(step + sample, mask=is_sampled, other=0)
                        noise = _gumbel(seeds, steps, first_id + column_id.to(tl.int64))
                        is_key = valid & is_sampled[:, None]
                        keys = tl.where(is_key, z_sample + noise, float("-inf"))
                        worst_key = _keep_best(
                            keys, z_sample, worst_key, column_id, sample_keys + kept_key,
                            sample_ids + kept_key, sample_logits + kept_key, is_sampled, True,
                        )  # fmt: skip
                    worst = _keep_best(
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
        _sort_slots(part_logits + kept, part_ids + kept, part_logits, inside, K, K2, False)
        if NOISE:
            _sort_slots(
                sample_keys + kept_key, sample_ids + kept_key, sample_logits + kept_key,
                is_sampled, N, N2, True,
            )  # fmt: skip


@triton.jit
def _merge_sorted(
    part_values, part_ids, part_carried, values, ids, carried, row, n_rows, n_parts, first_id,
    K: tl.constexpr, K2: tl.constexpr, S2: tl.constexpr, PAYLOAD: tl.constexpr,
):  # fmt: skip
    """K best of n_parts sorted lists [K2], by their heads."""
    part = tl.arange(0, S2)
    is_part = part < n_parts
    base = (part.to(tl.int64) * n_rows + row) * K2
    taken = tl.zeros([S2], tl.int32)
    for rank in range(K):
        is_left = is_part & (taken < K)
        head = tl.load(part_values + base + taken, mask=is_left, other=float("-inf"))
        head_id = tl.load(part_ids + base + taken, mask=is_left, other=-1)
        top = tl.max(head, 0)
        best = tl.min(tl.where((head == top) & (head_id >= 0), head_id, _NO_ID), 0)
        is_best = is_left & (head_id == best)
        out = row * K + rank
        tl.store(values + out, top)
        tl.store(ids + out, tl.where(best == _NO_ID, -1, best.to(tl.int64) + first_id))
        if PAYLOAD:
            picked = tl.load(part_carried + base + taken, mask=is_best, other=0)
            tl.store(carried + out, tl.where(best == _NO_ID, float("-inf"), tl.sum(picked, 0)))
        taken += is_best.to(tl.int32)


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
    _merge_sorted(
        part_logits, part_ids, part_logits, logits, token_ids, logits, row, n_rows, n_parts,
        first_id, K, K2, S2, False,
    )  # fmt: skip
    if NOISE:  # noqa: SIM102 - without noise nothing in here is compiled
        if row < n_samples:
            _merge_sorted(
                part_sample_keys, part_sample_ids, part_sample_logits,
                sample_keys, sample_ids, sample_logits,
                row, n_samples, n_parts, first_id, N, N2, S2, True,
            )  # fmt: skip

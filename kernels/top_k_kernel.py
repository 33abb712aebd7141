"""The top-k of rows whose logits come in parts, in Triton: candidates in slots, then in order.

Candidates are kept unsorted, in memory that stays in cache. A part costs one comparison of its row
maxima with the rows' worst candidates; only while some row's maximum beats its worst is the best id
taken out of the part and put in the slot of the worst. Parts come in the order of ids, and ties
within a part are taken lowest id first, so a tie never replaces a candidate, which leaves the lower
id. Legend: BR rows and BV ids of a part, K candidates in K2 slots, a power of two, per row.
"""

from __future__ import annotations

from .triton_shim import tl, triton

_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def keep_best(
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
def clear_slots(kept_values, kept_ids, inside, BR: tl.constexpr, K: tl.constexpr, K2: tl.constexpr):
    """Empty slots: value -inf; those beyond K hold +inf and are never taken."""
    slot = tl.arange(0, K2)[None, :] + tl.zeros([BR, 1], tl.int32)
    value = tl.where(slot < K, float("-inf"), float("inf"))
    tl.store(kept_values, value, mask=inside[:, None])
    tl.store(kept_ids, -1 - slot, mask=inside[:, None])


@triton.jit
def sort_slots(
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
    for rank in range(K):
        top = tl.max(values, 1)
        best = tl.min(tl.where((values == top[:, None]) & (ids >= 0), ids, _NO_ID), 1)
        taken, here = ids == best[:, None], slot == rank
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
def merge_sorted(
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

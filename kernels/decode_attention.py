"""Attention of one new token per request over a static cache, split along it (flash-decoding).

    s = q · Kᵀ / sqrt(D)      out = softmax(s) · V          over positions 0 .. length - 1
    split j holds m = max s, l = Σ exp(s - m), a = Σ exp(s - m) · v
    out = Σ_j exp(m_j - M) a_j / Σ_j exp(m_j - M) l_j       M = max_j m_j

B requests, H query and K key/value heads (G = H / K share one), S positions of capacity, D head
size. q [B, H, D]; keys, values [B, K, S, D]; lengths [B] stay in device memory, so that a captured
CUDA graph serves every length. The bound is reading each key and value once: 2 B K length D
numbers. Every request is cut into the same number of equal parts, by its actual length: no part is
idle as long as there are positions. Their number follows from the shapes of q and the cache, so
that a step gives the same bits whenever it runs, eager or captured. The tensor cores take softmax
weights in the cache's dtype only; where it has 16 bits, a weight goes in as high + low part, the
low parts in rows of the product that would otherwise be padding (it has 16 at least), so that only
the output is rounded to 16 bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import through_op, use_triton
from .launch import Config, chip_of, fewest_parts, launch
from .triton_shim import tl, triton

MOST_SPLITS = 128
LEAST_POSITIONS = 128  # a split of fewer does not pay for the second kernel
TILE_BYTES = 16384  # of keys; values take as much again, and that times the stages
REGISTERS = 65536  # of a processor, on every chip since Volta
MERGE_TILE, MERGE_WARPS = 4096, 4
GOOD_FILL = 0.95
LOG2_E = 1 / math.log(2)


def decode_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, span: int | None = None
) -> Tensor:
    """Each request alone on a CPU, so that its bits do not depend on the others' lengths.

    Elsewhere, where reading a length would wait for the device, all together under a mask: cache
    entries beyond a length then get a weight of 0 and must be finite.
    """
    if lengths.is_cpu:
        alone = [
            F.scaled_dot_product_attention(
                q[request, None, :, None],
                keys[request, None, :, :n],
                values[request, None, :, :n],
                enable_gqa=True,
            )
            if n > 0
            else q.new_zeros(1, q.shape[1], 1, q.shape[2])
            for request, n in enumerate(lengths.tolist())
        ]
        return torch.cat(alone)[:, :, 0] if alone else q.clone()
    keys, values = keys[:, :, :span], values[:, :, :span]
    index = torch.arange(keys.shape[2], device=q.device)
    visible = (index < lengths[:, None])[:, None, None]  # [B, 1, 1, S]
    out = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=visible, enable_gqa=True
    )[:, :, 0]
    return out.masked_fill((lengths <= 0)[:, None, None], 0)


@triton.jit
def _split_kernel(
    q,
    keys,
    values,
    lengths,
    out,
    stats,
    q_batch,
    q_head,
    key_batch,
    key_head,
    key_position,
    value_batch,
    value_head,
    value_position,
    length_stride,
    capacity,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DIRECT: tl.constexpr,
):
    request, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv_heads, split, splits = tl.num_programs(1), tl.program_id(2), tl.num_programs(2)
    length = tl.load(lengths + request * length_stride)
    length = tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)
    part = tl.cdiv(length, splits)
    begin = split * part
    end = tl.minimum(begin + part, length)

    row, column = tl.arange(0, PARTS * GROUP), tl.arange(0, WIDTH)
    offset = tl.arange(0, BLOCK)
    head = kv_head * G + row % GROUP
    there = (row % GROUP < G)[:, None] & (column < D)[None, :]
    queries = tl.load(
        q + request * q_batch + head[:, None] * q_head + column[None, :], mask=there, other=0
    )  # [PARTS * GROUP, WIDTH]
    key_rows = keys + request * key_batch + kv_head * key_head + column[None, :]
    value_rows = values + request * value_batch + kv_head * value_head + column[None, :]

    best = tl.full((PARTS * GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((PARTS * GROUP,), tl.float32)
    mixed = tl.zeros((PARTS * GROUP, WIDTH), tl.float32)
    for start in range(begin, end, BLOCK):
        inside = start + offset < end
        position = (start + offset).to(tl.int64)[:, None]
        loaded = inside[:, None] & (column < D)[None, :]
        key = tl.load(key_rows + position * key_position, mask=loaded, other=0)  # [BLOCK, WIDTH]
        score = tl.dot(queries, tl.trans(key), input_precision="ieee")
        score = tl.where(inside[None, :], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        # subtracted before it is scaled: scaled first, a fused multiply-add of large scores
        # leaves a rounding error above 0, whose exponential overflows
        weight = tl.exp2((score - new_best[:, None]) * scale)
        fade = tl.exp2((best - new_best) * scale)
        total = total * fade + tl.sum(weight, 1)
        if PARTS == 2:
            high = weight.to(values.dtype.element_ty).to(tl.float32)
            weight = tl.where((row >= GROUP)[:, None], weight - high, weight)
        weight = weight.to(values.dtype.element_ty)
        value = tl.load(value_rows + position * value_position, mask=loaded, other=0)
        mixed = tl.dot(weight, value, mixed * fade[:, None], input_precision="ieee")
        best = new_best

    mixed = tl.sum(tl.reshape(mixed, (PARTS, GROUP, WIDTH)), 0)
    best = tl.max(tl.reshape(best, (PARTS, GROUP)), 0)
    total = tl.max(tl.reshape(total, (PARTS, GROUP)), 0)
    member = tl.arange(0, GROUP)
    part_row = ((request * kv_heads + kv_head) * G + member) * splits + split
    if DIRECT:
        mixed = tl.div_rn(mixed, tl.where(total == 0, 1.0, total)[:, None])
    else:
        tl.store(stats + part_row, best, mask=member < G)
        rows = tl.num_programs(0).to(tl.int64) * kv_heads * G * splits
        tl.store(stats + rows + part_row, total, mask=member < G)
    stored = (member < G)[:, None] & (column < D)[None, :]
    where = out + part_row[:, None] * D + column[None, :]
    tl.store(where, mixed.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _merge_kernel(
    partial,
    stats,
    out,
    splits,
    scale,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOWEST: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = row * splits + split
    rows = tl.num_programs(0).to(tl.int64) * splits
    best = tl.load(stats + part, mask=split < splits, other=float("-inf"))
    total = tl.load(stats + rows + part, mask=split < splits, other=0)
    there = (split < splits)[:, None] & (column < D)[None, :]
    mixed = tl.load(partial + part[:, None] * D + column[None, :], mask=there, other=0)
    # best is -inf for splits without positions; if top were, too, their difference would be NaN
    top = tl.maximum(tl.max(best, 0), LOWEST)
    share = tl.exp2((best - top) * scale)
    denominator = tl.sum(share * total, 0)
    mixed = tl.div_rn(
        tl.sum(share[:, None] * mixed, 0), tl.where(denominator == 0, 1.0, denominator)
    )
    tl.store(out + row * D + column, mixed.to(out.dtype.element_ty), mask=column < D)


def _config(rows: int, width: int, bytes_each: int) -> Config:
    """The configuration; tile: positions per step, and programs that a processor holds at once.

    It follows from the shapes and is never timed: tiles and splits decide how sums are rounded.
    """
    # products of float32 take no tensor cores, and larger tiles of them spill registers
    block = 16 if bytes_each == 4 else min(128, max(16, TILE_BYTES // (width * bytes_each)))
    if rows > 16 or width * bytes_each > 512:
        return Config((block, 2 if rows <= 32 else 1), warps=8, stages=3)
    return Config((block, 2), warps=4, stages=3)


def split_count(pairs: int, capacity: int, resident: int) -> int:
    """Splits for `pairs` of (request, kv head), where `resident` programs run at once."""
    most = max(1, min(MOST_SPLITS, capacity // LEAST_POSITIONS))
    return fewest_parts(pairs, most, resident, GOOD_FILL)


def _forward(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, span: int | None) -> Tensor:
    if not use_triton(q):
        return decode_attention_reference(q, keys, values, lengths, span=span)
    (batch, n_heads, head_dim), (_, kv_heads, capacity, _) = q.shape, keys.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    q, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values))
    shared = n_heads // kv_heads  # G
    width = max(16, triton.next_power_of_2(head_dim))
    parts = 1 if q.dtype == torch.float32 else 2  # of a weight: itself, or high and low
    rows = max(16, parts * triton.next_power_of_2(shared))
    scale = LOG2_E / math.sqrt(head_dim)
    config = _config(rows, width, q.element_size())
    resident = config.tile[1] * chip_of(q.device).processors
    splits = split_count(batch * kv_heads, capacity, resident)
    partial, stats = out, out
    if splits > 1:
        partial = q.new_empty((batch, n_heads, splits, head_dim), dtype=torch.float32)
        stats = q.new_empty((2, batch, n_heads, splits), dtype=torch.float32)
    launch(
        _split_kernel,
        (batch, kv_heads, splits),
        q,
        keys,
        values,
        lengths,
        partial,
        stats,
        *q.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        lengths.stride(0),
        capacity,
        scale,
        G=shared,
        D=head_dim,
        GROUP=rows // parts,
        PARTS=parts,
        WIDTH=width,
        BLOCK=config.tile[0],
        DIRECT=splits == 1,
        num_warps=config.warps,
        num_stages=config.stages,
        # without maxnreg, ptxas at times uses half of these and spills
        maxnreg=min(255, REGISTERS // (config.tile[1] * 32 * config.warps) // 8 * 8),
    )
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        block = min(width, MERGE_TILE // padded)
        launch(
            _merge_kernel,
            (batch * n_heads, triton.cdiv(head_dim, block)),
            partial,
            stats,
            out,
            splits,
            scale,
            D=head_dim,
            SPLITS=padded,
            BLOCK=block,
            LOWEST=torch.finfo(torch.float32).min,
            num_warps=MERGE_WARPS,
        )
    return out


@torch.library.custom_op("shardlens::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, span: int | None
) -> Tensor:
    return _forward(q, keys, values, lengths, span)


@_decode_attention.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, span: int | None) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, span: int | None = None
) -> Tensor:
    """Attention of q [B, H, D] to positions 0 .. lengths - 1 of keys, values [B, K, S, D].

    lengths [B] int32 or int64, never read on the host; a request of length 0 gets zeros. span: an
    upper bound of lengths known to the host, which saves the reference work. Returns [B, H, D],
    contiguous. Raises ValueError where shapes or dtypes do not fit together.
    """
    batch, n_heads, head_dim = q.shape
    if keys.shape != values.shape or keys.shape[::3] != (batch, head_dim):
        raise ValueError(
            f"q {list(q.shape)} does not go with keys {list(keys.shape)} "
            f"and values {list(values.shape)}: they are [B, H, D] and twice [B, K, S, D]"
        )
    if n_heads % keys.shape[1]:
        raise ValueError(f"{n_heads} query heads cannot share {keys.shape[1]} key heads evenly")
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"dtypes differ: q {q.dtype}, keys {keys.dtype}, values {values.dtype}")
    if lengths.shape != (batch,) or lengths.dtype not in (torch.int32, torch.int64):
        found = f"{lengths.dtype} {list(lengths.shape)}"
        raise ValueError(f"lengths is {found}: it needs one integer per request")
    if through_op(q, keys, values):
        out: Tensor = torch.ops.shardlens.decode_attention(q, keys, values, lengths, span)
        return out
    return _forward(q, keys, values, lengths, span)

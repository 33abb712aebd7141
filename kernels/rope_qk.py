"""From the fused projection to attention: q/k norm, rotary embedding, write into the cache.

    q, k = norm(q), norm(k)     norm(x) = cast(x / sqrt(mean(x²) + eps)) * weight, where given
    (a, b) -> (a cos - b sin, b cos + a sin)        a, b: first and second half of a head of q, k
    keys[b, :, positions[b, t]] = k                 values[b, :, positions[b, t]] = v

B requests, T new tokens, H query and K key/value heads, D head size, S positions of capacity.
Reads (H + 2K) D and writes as many numbers per token, which bounds its speed. Arithmetic is
float32, rounded once, but for the cast before the norm's weight, which published weights expect.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import through_op, use_triton
from .launch import launch
from .rmsnorm_steer import rmsnorm_reference
from .rope import rope_reference
from .rounding import inverse_rms
from .triton_shim import tl, triton

TILE, WARPS = 512, 2  # numbers of half-heads that a program holds, twice


def rope_qk_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    eps: float = 0.0,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
) -> Tensor:
    _, kv_heads, _, head_dim = keys.shape
    heads = qkv.unflatten(-1, (-1, head_dim))  # [B, T, H + 2K, D]
    n_heads = heads.shape[2] - 2 * kv_heads
    qk, v = heads.split((n_heads + kv_heads, kv_heads), dim=2)
    if q_weight is not None and k_weight is not None:
        q, k = qk.split((n_heads, kv_heads), dim=2)
        normed = rmsnorm_reference(q, q_weight, eps), rmsnorm_reference(k, k_weight, eps)
        qk = torch.cat(normed, 2)
    qk = rope_reference(qk, cos, sin)
    if qk.is_cpu and not math.isfinite(
        qk.sum().item()
    ):  # a sum of finite numbers may leave their range
        v = marked_values(qk, v)
    q, k = qk.split((n_heads, kv_heads), dim=2)
    where = torch.arange(len(qkv), device=qkv.device)[:, None], positions
    keys.transpose(1, 2).index_put_(where, k)
    values.transpose(1, 2).index_put_(where, v)
    return q.contiguous()


def marked_values(qk: Tensor, v: Tensor) -> Tensor:
    """v [B, T, K, D] with NaN for tokens whose q or k, both in qk [B, T, heads, D], is not finite.

    PyTorch's attention on CPUs takes scores of NaN for no score at all, and answers with finite
    numbers; values of NaN it keeps.
    """
    is_finite = qk.isfinite().flatten(2).all(-1)
    return v.masked_fill(~is_finite[..., None, None], torch.nan)


@triton.jit
def _normed(a, b, weight_a, weight_b, eps, D: tl.constexpr, dtype: tl.constexpr):
    """Both halves [heads, D/2] of heads, normalised over the whole of each."""
    scale = inverse_rms(tl.sum(a * a, 1) + tl.sum(b * b, 1), D, eps)[:, None]
    a, b = (a * scale).to(dtype).to(tl.float32), (b * scale).to(dtype).to(tl.float32)
    return a * weight_a, b * weight_b


@triton.jit
def _rope_qk_kernel(
    qkv,
    cos,
    sin,
    q,
    keys,
    values,
    positions,
    q_weight,
    k_weight,
    in_batch,
    in_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    key_batch,
    key_head,
    key_position,
    value_batch,
    value_head,
    value_position,
    position_batch,
    position_token,
    n_tokens,
    n_heads,
    kv_heads,
    capacity,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = qkv.dtype.element_ty
    request = (tl.program_id(0) // n_tokens).to(tl.int64)
    token = (tl.program_id(0) % n_tokens).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < HALF
    is_q, is_v = head < n_heads, head >= n_heads + kv_heads
    is_k = (head >= n_heads) & (head < n_heads + kv_heads)
    there = inside & (head < n_heads + 2 * kv_heads)

    row = qkv + request * in_batch + token * in_token + head * D + column
    a = tl.load(row, mask=there, other=0).to(tl.float32)  # [HEADS, WIDTH]
    b = tl.load(row + HALF, mask=there, other=0).to(tl.float32)
    cos_row = cos + request * cos_batch + token * cos_token + column
    sin_row = sin + request * sin_batch + token * sin_token + column
    cosine = tl.load(cos_row, mask=inside, other=0).to(tl.float32)  # [1, WIDTH]
    sine = tl.load(sin_row, mask=inside, other=0).to(tl.float32)

    new_a, new_b = a, b
    if NORM:
        weight_a = tl.load(q_weight + column, mask=inside & is_q, other=0).to(tl.float32)
        weight_b = tl.load(q_weight + HALF + column, mask=inside & is_q, other=0).to(tl.float32)
        weight_a += tl.load(k_weight + column, mask=inside & is_k, other=0).to(tl.float32)
        weight_b += tl.load(k_weight + HALF + column, mask=inside & is_k, other=0).to(tl.float32)
        new_a, new_b = _normed(a, b, weight_a, weight_b, eps, D, dtype)
    a = tl.where(is_v, a, new_a * cosine - new_b * sine).to(dtype)
    b = tl.where(is_v, b, new_b * cosine + new_a * sine).to(dtype)

    q_row = q + (tl.program_id(0).to(tl.int64) * n_heads + head) * D + column
    tl.store(q_row, a, mask=there & is_q)
    tl.store(q_row + HALF, b, mask=there & is_q)
    position = tl.load(positions + request * position_batch + token * position_token)
    # a tile of one: the interpreter's `&` of a mask and a scalar is no mask
    position = position.to(tl.int64) + tl.zeros((1, 1), tl.int64)
    there = there & (position >= 0) & (position < capacity)
    key_row = keys + request * key_batch + position * key_position + column
    key_row += (head - n_heads).to(tl.int64) * key_head
    tl.store(key_row, a, mask=there & is_k)
    tl.store(key_row + HALF, b, mask=there & is_k)
    value_row = values + request * value_batch + position * value_position + column
    value_row += (head - n_heads - kv_heads).to(tl.int64) * value_head
    tl.store(value_row, a, mask=there & is_v)
    tl.store(value_row + HALF, b, mask=there & is_v)


def _forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    eps: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> Tensor:
    if not use_triton(qkv):
        return rope_qk_reference(
            qkv, cos, sin, keys, values, positions, eps=eps, q_weight=q_weight, k_weight=k_weight
        )
    batch, n_tokens, size = qkv.shape
    _, kv_heads, capacity, head_dim = keys.shape
    n_heads = size // head_dim - 2 * kv_heads
    q = torch.empty((batch, n_tokens, n_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    qkv, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (qkv, cos, sin))
    cos, sin = (x.expand(batch, -1, -1, -1) for x in (cos, sin))
    weights = qkv, qkv  # which the kernel does not read
    norm = False
    if q_weight is not None and k_weight is not None:
        norm, weights = True, (q_weight.contiguous(), k_weight.contiguous())
    width = triton.next_power_of_2(head_dim // 2)
    heads = max(1, TILE // width)
    launch(
        _rope_qk_kernel,
        (batch * n_tokens, triton.cdiv(n_heads + 2 * kv_heads, heads)),
        qkv,
        cos,
        sin,
        q,
        keys,
        values,
        positions,
        *weights,
        *qkv.stride()[:2],
        *cos.stride()[:2],
        *sin.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        *positions.stride(),
        n_tokens,
        n_heads,
        kv_heads,
        capacity,
        eps,
        D=head_dim,
        NORM=norm,
        HEADS=heads,
        WIDTH=width,
        num_warps=WARPS,
    )
    return q


@torch.library.custom_op("shardlens::rope_qk", mutates_args=("keys", "values"))
def _rope_qk(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    eps: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> Tensor:
    return _forward(qkv, cos, sin, keys, values, positions, eps, q_weight, k_weight)


@_rope_qk.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    eps: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> Tensor:
    (batch, n_tokens, size), (_, kv_heads, _, head_dim) = qkv.shape, keys.shape
    return qkv.new_empty(batch, n_tokens, size // head_dim - 2 * kv_heads, head_dim)


def rope_qk(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    eps: float = 0.0,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
) -> Tensor:
    """Normalise and rotate q and k of qkv [B, T, (H + 2K) D]; write k, v into the cache.

    cos, sin [B or 1, T, 1, D/2]; keys, values [B, K, S, D], written in place at positions [B, T]
    int64, which must lie below S. q_weight, k_weight [D]: both for a norm per head before the
    rotation, or neither. Returns q [B, T, H, D], contiguous. Raises ValueError where shapes or
    dtypes do not fit together.
    """
    (batch, n_tokens, size), (_, kv_heads, _, head_dim) = qkv.shape, keys.shape
    if keys.shape != values.shape or len(keys) != batch or head_dim % 2 or size % head_dim:
        raise ValueError(
            f"qkv {list(qkv.shape)} does not go with keys {list(keys.shape)} "
            f"and values {list(values.shape)}: they are [B, T, (H + 2K) D] and twice [B, K, S, D]"
        )
    if size <= 2 * kv_heads * head_dim:
        raise ValueError(f"qkv of {size} columns holds no query head beside {kv_heads} kv heads")
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("the last dim of keys and values must be adjacent in memory")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape[1:] != (n_tokens, 1, head_dim // 2) or len(angles) not in (1, batch):
            raise ValueError(
                f"{name} is {list(angles.shape)}: [{batch} or 1, {n_tokens}, 1, {head_dim // 2}]"
            )
    if not qkv.dtype == keys.dtype == values.dtype:
        raise ValueError(f"dtypes differ: {qkv.dtype}, keys {keys.dtype}, values {values.dtype}")
    if positions.shape != (batch, n_tokens) or positions.dtype != torch.int64:
        raise ValueError(f"positions is {positions.dtype} {list(positions.shape)}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together or not at all")
    if through_op(qkv, q_weight, k_weight):
        q: Tensor = torch.ops.shardlens.rope_qk(
            qkv, cos, sin, keys, values, positions, eps, q_weight, k_weight
        )
        return q
    return _forward(qkv, cos, sin, keys, values, positions, eps, q_weight, k_weight)

"""Attention of a block: among the tokens of a pass, or over a cache. Chunks need no mask.

A chunk of T tokens ends at position S - 1, so token t sees positions up to S - T + t: the lower
right triangle of [T, S], for which flash and memory-efficient attention have a flag. A mask would
grow with every chunk, and cuDNN, which PyTorch may prefer for masks, would plan for each anew.

Legend: B requests, T new tokens, H query and K key/value heads of this rank, D head size, S
positions attended to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.decode_attention import decode_attention
from ..kernels.rope import rope_reference
from ..kernels.rope_qk import marked_values, rope_qk
from ..parallel.group import TensorParallel
from ..parallel.linear import ColumnLinear, RowLinear
from ..parallel.spans import Span
from .cache import KVCache
from .config import ModelConfig
from .norm import RMSNorm

# (the block's attention, its number, q, k, v fused [B, T, (H + 2K) D]) -> mixed [B, T, H, D]
AttendFn = Callable[["Attention", int, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(
        self, config: ModelConfig, spans: dict[str, Span], parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.q_size, self.kv_size = spans["heads"].padded, spans["kv_heads"].padded
        self.qkv = ColumnLinear(
            config.d, self.q_size + 2 * self.kv_size, bias=config.qkv_bias, parallel=parallel
        )
        self.o = RowLinear(self.q_size, config.d, bias=config.o_bias, parallel=parallel)
        qk_norm, size, eps = config.qk_norm, config.head_dim, config.norm_eps
        self.q_norm = RMSNorm(size, eps) if qk_norm else None
        self.k_norm = RMSNorm(size, eps) if qk_norm else None

    def forward(self, x: Tensor, layer: int, attend: AttendFn) -> Tensor:
        out: Tensor = self.o(attend(self, layer, self.qkv(x)).flatten(-2))
        return out


def queries_keys_values(
    attn: Attention, qkv: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, heads, D] each, q and k normed and rotated; differentiable."""
    parts = qkv.split((attn.q_size, attn.kv_size, attn.kv_size), dim=-1)
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    if attn.q_norm is not None and attn.k_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    return rope_reference(q, *rope), rope_reference(k, *rope), v


def causal_attention(rope: tuple[Tensor, Tensor]) -> AttendFn:
    """Every token attends to itself and to those before it; differentiable."""

    def attend(attn: Attention, layer: int, qkv: Tensor) -> Tensor:
        q, k, v = queries_keys_values(attn, qkv, rope)
        if v.is_cpu:
            v = marked_values(torch.cat((q, k), 2).detach(), v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2)

    return attend


def cached_attention(
    cache: KVCache, positions: Tensor, rope: tuple[Tensor, Tensor], start: int | None = None
) -> AttendFn:
    """Tokens at absolute `positions` [B, T] attend to the cache, which they are written to first.

    start: see `Transformer.forward`. With it a token sees the cache up to the lower right diagonal
    of [T, S], for which fused kernels need no mask.
    """
    n_tokens = positions.shape[1]
    span = (cache.longest if start is None else start) + n_tokens
    lengths = positions[:, 0] + 1
    visible: Tensor | None = None
    if n_tokens > 1 and start is not None and start > 0:
        visible = _lower_right(n_tokens, span, positions.device)
    elif n_tokens > 1 and start is None:
        index = torch.arange(span, device=positions.device)
        seen = index <= positions[..., None]  # [B, T, S]
        # each request's mask, once for each of its key/value heads
        visible = seen.repeat_interleave(cache.keys.shape[2], 0)[:, None]

    def attend(attn: Attention, layer: int, qkv: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        norms = {}
        if attn.q_norm is not None and attn.k_norm is not None:
            norms = {"q_weight": attn.q_norm.weight, "k_weight": attn.k_norm.weight}
        q = rope_qk(qkv, *rope, keys, values, positions, eps=attn.eps, **norms)
        if n_tokens == 1:
            return decode_attention(q[:, 0], keys, values, lengths, span=span)[:, None]
        return grouped_attention(q, keys[:, :, :span], values[:, :, :span], visible)

    return attend


def _lower_right(n_tokens: int, span: int, device: torch.device) -> Tensor:
    """The mask of the last n_tokens of a text of `span`; as a flag, where fused kernels take it."""
    if device.type == "cpu":  # where PyTorch makes the mask of its flag, and imports its compiler
        return torch.ones(n_tokens, span, dtype=torch.bool).tril(span - n_tokens)
    from .lower_right import LowerRight

    return LowerRight(n_tokens, span)


def grouped_attention(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of q [B, T, H, D] to keys, values [B, K, S, D]: [B, T, H, D].

    visible: a LowerRight, or which positions are seen, [T, S] or [B K, 1, T, S]; None where T is S
    and a token sees itself and those before it. Each key/value head with its queries is an entry of
    the batch, [B K, H / K, T, D], in which it is shared and not repeated: fused kernels without
    grouped-query attention run it, too.
    """
    batch, kv_heads = keys.shape[:2]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (keys, values))
    is_causal = visible is None
    mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible, is_causal=is_causal)
    return mixed.unflatten(0, (batch, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)

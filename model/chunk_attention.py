"""Attention of a chunk of tokens over a cache, for fused kernels: no mask, no repeated heads.

A chunk of T tokens ends at position S - 1, so token t sees positions up to S - T + t: the lower
right triangle of [T, S], which flash and memory-efficient attention know by its name. As a mask it
would grow with every chunk, and cuDNN, which PyTorch may prefer for masks, would plan each anew.

Legend: B requests, H query and K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant


class LowerRight(CausalBias):
    """PyTorch's bias of that name without its memory, [2, T, S] numbers that nothing reads."""

    def __new__(cls, *sizes: Any) -> LowerRight:
        return torch.Tensor._make_subclass(cls, torch.empty(0))

    def __init__(self, n_tokens: int, span: int) -> None:
        super().__init__(CausalVariant.LOWER_RIGHT, n_tokens, span)


def grouped_attention(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Attention of q [B, T, H, D] to keys, values [B, K, S, D]: [B, T, H, D].

    visible: a LowerRight, or which positions are seen [B K, 1, T, S]. Each key/value head with its
    queries is a batch of its own, [B K, H / K, T, D], in which it is shared and not repeated: fused
    kernels that know no groups take it, too.
    """
    batch, kv_heads = keys.shape[:2]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (keys, values))
    mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible)
    return mixed.unflatten(0, (batch, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)

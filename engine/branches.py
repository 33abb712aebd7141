"""Many continuations of one text in one pass: each sees the text's cache, and itself.

A text of S positions is fed once. Then M branches of T tokens each, which differ in their tokens
or in how they are edited, run as rows of one forward pass: M · T rows instead of M passes over
S + T. A branch token's scores are those against the S shared keys, beside those against its own
branch up to itself; one softmax over both gives what a separate pass gives, up to rounding.

Legend: M branches, T tokens of each, S shared positions; on this rank K key/value heads, and G
query heads for each of them; D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..model.attention import AttendFn, Attention, queries_keys_values
from ..model.cache import KVCache
from ..model.tap_edits import NO_EDITS, TapEdits
from ..model.tap_sink import NO_TAPS, TapSink
from ..model.transformer import ForwardPass, Transformer
from .limits import PREFILL_CHUNK


def shared_prefix(model: Transformer, token_ids: list[int]) -> KVCache:
    """The cache of one text, which may be empty, for branches to continue."""
    cache = model.new_cache(1, len(token_ids))
    ids = torch.tensor([token_ids], dtype=torch.int64, device=model.device)
    for chunk in ids.split(PREFILL_CHUNK, dim=1) if token_ids else ():
        model(chunk, cache=cache, start=cache.longest)
    return cache


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids of branches [M, T] int64, padded on the right to the longest with id 0."""
    rows = [torch.tensor(text, dtype=torch.int64) for text in texts]
    return pad_sequence(rows, batch_first=True).to(device)


def run_branches(
    model: Transformer,
    cache: KVCache,
    token_ids: Tensor,
    *,
    sink: TapSink = NO_TAPS,
    edits: TapEdits = NO_EDITS,
) -> Tensor:
    """Residual stream [M, T, d] of branches token_ids [M, T], before the final norm.

    cache: of one request, which all branches continue; it is left unchanged. edits: of the M · T
    rows. Branches may be padded on the right. Raises ValueError where they would rotate the shared
    keys differently.
    """
    positions = cache.longest + torch.arange(token_ids.shape[1], device=token_ids.device)
    scaling = model.config.rope_scaling
    if scaling.kind == "dynamic" and cache.longest + token_ids.shape[1] > scaling.original_context:
        raise ValueError(
            "texts that share a beginning must stay within the original context of "
            f"{scaling.original_context}: beyond it, dynamic rope depends on each text's length"
        )
    attend = _branch_attention(cache, model.rope(positions[None]))
    return model.through_blocks(token_ids, ForwardPass(attend, sink, edits))


def _branch_attention(cache: KVCache, rope: tuple[Tensor, Tensor]) -> AttendFn:
    def attend(attn: Attention, layer: int, qkv: Tensor) -> Tensor:
        q, k, v = queries_keys_values(attn, qkv, rope)  # [M, T, heads, D]
        shared_k, shared_v = (
            buffer[layer, 0, :, : cache.longest] for buffer in (cache.keys, cache.values)
        )  # [K, S, D]
        m, t, n_heads, d = q.shape
        n_kv, s = shared_k.shape[:2]
        g = n_heads // n_kv
        k, v = (part.permute(0, 2, 1, 3)[:, :, None] for part in (k, v))  # [M, K, 1, T, D]
        q = q.view(m, t, n_kv, g, d).permute(0, 2, 3, 1, 4) * d**-0.5  # [M, K, G, T, D]
        # all branches are rows of one product with the shared keys
        rows = q.transpose(0, 1).reshape(n_kv, m * g * t, d)
        shared_scores = (rows @ shared_k.mT).view(n_kv, m, g, t, s).transpose(0, 1)
        branch_scores = q @ k.mT  # [M, K, G, T, T]
        ahead = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        scores = torch.cat((shared_scores, branch_scores.masked_fill(ahead, -torch.inf)), -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        shared_weights, branch_weights = weights.split((s, t), dim=-1)
        rows = shared_weights.transpose(0, 1).reshape(n_kv, m * g * t, s)
        mixed = (rows @ shared_v).view(n_kv, m, g, t, d).transpose(0, 1) + branch_weights @ v
        return mixed.permute(0, 3, 1, 2, 4).reshape(m, t, n_heads, d)

    return attend

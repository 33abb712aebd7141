"""One decoder for every family. Shapes: B requests, T new tokens, d hidden size,
H query and K key/value heads of this rank, D head size, S positions attended to.

Sharding shows only in the sizes (`rank_spans`) and in the layer classes; the numbers that pass
between blocks are whole, and the same, on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.rmsnorm import rmsnorm_reference
from ..kernels.rope import rope_angles_reference, rope_reference
from ..kernels.swiglu import swiglu_reference
from ..parallel.group import TensorParallel
from ..parallel.linear import ColumnLinear, RowLinear
from ..parallel.shard import Span
from ..parallel.vocab import VocabEmbedding, VocabHead
from .cache import KVCache
from .capture import no_capture
from .config import ModelConfig, RopeScaling
from .sharding import rank_spans
from .tokenizer import Tokenizer

CaptureFn = Callable[[int, str, Tensor], None]
# (q [B, H, T, D], k, v [B, T, K, D]) -> [B, H, T, D]
AttendFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm_reference(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(
        self, config: ModelConfig, spans: dict[str, Span], parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_size, self.kv_size = spans["heads"].size, spans["kv_heads"].size
        self.qkv = ColumnLinear(
            config.d, self.q_size + 2 * self.kv_size, bias=config.qkv_bias, parallel=parallel
        )
        self.o = RowLinear(self.q_size, config.d, bias=config.o_bias, parallel=parallel)
        qk_norm = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, layer: int, rope: tuple[Tensor, Tensor], attend: AttendFn
    ) -> Tensor:
        q, k, v = self.qkv(x).split((self.q_size, self.kv_size, self.kv_size), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # [B, T, ., D]
        q = rope_reference(self.q_norm(q), *rope)
        k = rope_reference(self.k_norm(k), *rope)
        mixed = attend(layer, q.transpose(1, 2), k, v)  # [B, H, T, D]
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    def __init__(
        self, config: ModelConfig, spans: dict[str, Span], parallel: TensorParallel
    ) -> None:
        super().__init__()
        ffn, bias = spans["ffn"].size, config.mlp_bias
        self.gate_up = ColumnLinear(config.d, 2 * ffn, bias=bias, parallel=parallel)
        self.down = RowLinear(ffn, config.d, bias=bias, parallel=parallel)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu_reference(self.gate_up(x)))
        return out


class Block(nn.Module):
    def __init__(
        self, config: ModelConfig, spans: dict[str, Span], parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d, config.norm_eps)
        self.attn = Attention(config, spans, parallel)
        self.mlp_norm = RMSNorm(config.d, config.norm_eps)
        self.mlp = MLP(config, spans, parallel)

    def forward(
        self,
        x: Tensor,
        layer: int,
        rope: tuple[Tensor, Tensor],
        attend: AttendFn,
        capture: CaptureFn,
    ) -> Tensor:
        capture(layer, "resid_pre", x)
        normed = self.attn_norm(x)
        capture(layer, "attn_norm", normed)
        attn_out = self.attn(normed, layer, rope, attend)
        capture(layer, "attn_out", attn_out)
        x = x + attn_out
        capture(layer, "resid_mid", x)
        normed = self.mlp_norm(x)
        capture(layer, "mlp_norm", normed)
        mlp_out = self.mlp(normed)
        capture(layer, "mlp_out", mlp_out)
        x = x + mlp_out
        capture(layer, "resid_post", x)
        return x


class Transformer(nn.Module):
    """The blocks, the final norm and this rank's slice of embedding and head.

    Raises ValueError where `config` cannot be split over `parallel.size` ranks. Parameters are
    allocated on `device` ("meta" for none) and uninitialised: see `weights.py`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        parallel: TensorParallel | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        parallel = parallel if parallel is not None else TensorParallel.single()
        self.config, self.parallel = config, parallel
        self.spans = rank_spans(config, parallel)
        vocab = self.spans["vocab"]
        with torch.device(device):
            self.embed = VocabEmbedding(vocab, config.d, parallel=parallel)
            self.blocks = nn.ModuleList(
                Block(config, self.spans, parallel) for _ in range(config.n_layers)
            )
            self.norm = RMSNorm(config.d, config.norm_eps)
            self.head = VocabHead(vocab, config.d, parallel=parallel)
        self.to(dtype)
        self._tie_head()
        self._inv_freq = inverse_frequencies(config)
        self.tokenizer: Tokenizer | None = None

    def _tie_head(self) -> None:
        if self.config.tied_head:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        # to_empty, which turns meta tensors into real ones, would give the head its own copy
        super()._apply(fn, recurse)
        self._tie_head()
        return self

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for this rank's heads."""
        kv_heads = self.spans["kv_heads"].size // self.config.head_dim
        return KVCache(
            self.config.n_layers,
            batch,
            kv_heads,
            capacity,
            self.config.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(
        self,
        token_ids: Tensor,
        *,
        cache: KVCache | None = None,
        counts: Sequence[int] | None = None,
        capture: CaptureFn = no_capture,
    ) -> Tensor:
        """Residual stream after the last block, before the final norm.

        token_ids [B, T] int64; with a cache they follow what each request already holds.
        counts: how many of the T tokens of each request are real (default all); the rest is
        right padding whose output means nothing. Returns [B, T, d]. Differentiable without a
        cache. Raises ValueError where the cache is too small.
        """
        batch, n_tokens = token_ids.shape
        attend: AttendFn
        if cache is None:
            positions = torch.arange(n_tokens, device=token_ids.device)[None]
            attend = attend_causally
        else:
            positions = cache.next_positions(n_tokens)
            attend = cached_attention(cache, positions)
        self._inv_freq = self._inv_freq.to(token_ids.device)
        rope = rope_angles_reference(positions, self._inv_freq, self.dtype)
        x: Tensor = self.embed(token_ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, rope, attend, capture)
        if cache is not None:
            cache.advance(counts if counts is not None else [n_tokens] * batch)
        return x


def attend_causally(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )


def cached_attention(cache: KVCache, positions: Tensor) -> AttendFn:
    """Attention of tokens at absolute `positions` [B, T] over the cache and themselves."""
    span = max(cache.lengths) + positions.shape[1]
    index = torch.arange(span, device=positions.device)
    visible = (index <= positions[..., None])[:, None]  # [B, 1, T, S]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.write(layer, positions, k, v, span)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True)

    return attend


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies [head_dim/2] float32, with the family's scaling.

    "llama3" (the Llama 3.1 release): wavelengths above original_context / low_freq_factor are
    stretched by `factor`, those below original_context / high_freq_factor are kept, and between
    them the two are mixed linearly in original_context / wavelength.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    scaling: RopeScaling = config.rope_scaling
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_context * inv_freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return inv_freq * (kept + (1 - kept) / scaling.factor)
    return inv_freq

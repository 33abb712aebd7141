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

from ..kernels.decode_attention import decode_attention
from ..kernels.edits import Edits
from ..kernels.rmsnorm_steer import rmsnorm_steer
from ..kernels.rope import rope_angles_reference, rope_reference
from ..kernels.rope_qk import rope_qk
from ..kernels.swiglu import swiglu
from ..parallel.group import TensorParallel
from ..parallel.linear import ColumnLinear, RowLinear
from ..parallel.shard import Span
from ..parallel.vocab import VocabEmbedding, VocabHead
from .access import NO_ACCESS, Access
from .cache import KVCache
from .chunk_attention import LowerRight, grouped_attention
from .config import ModelConfig, RopeScaling
from .edit_table import NO_EDITS, EditTable, SiteEdits
from .points import Tap
from .sharding import rank_spans
from .tokenizer import Tokenizer

# (the block's attention, its number, q, k, v fused [B, T, (H + 2K) D]) -> mixed [B, T, H, D]
AttendFn = Callable[["Attention", int, Tensor], Tensor]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm_steer(x, self.weight, self.eps)[0]

    def of_sum(
        self,
        x: Tensor,
        residual: Tensor | None,
        *,
        before: Edits | None = None,
        after: Edits | None = None,
        h_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, the sum), both edited on the way: one pass for all."""
        return rmsnorm_steer(
            x, self.weight, self.eps, residual=residual, before=before, after=after, h_out=h_out
        )

    def edited(self, x: Tensor, edits: Sequence[Edits], residual: Tensor | None = None) -> Tensor:
        """x + residual with its edits, one after another; x itself where there is neither.

        The norm's kernel edits what it reads, and the norm is left unused.
        """
        for one in edits:
            x, residual = self.of_sum(x, residual, before=one)[1], None
        return x if residual is None else x + residual


class Attention(nn.Module):
    def __init__(
        self, config: ModelConfig, spans: dict[str, Span], parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.q_size, self.kv_size = spans["heads"].size, spans["kv_heads"].size
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


class MLP(nn.Module):
    def __init__(
        self, config: ModelConfig, spans: dict[str, Span], parallel: TensorParallel
    ) -> None:
        super().__init__()
        ffn, bias = spans["ffn"].size, config.mlp_bias
        self.gate_up = ColumnLinear(config.d, 2 * ffn, bias=bias, parallel=parallel)
        self.down = RowLinear(ffn, config.d, bias=bias, parallel=parallel)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu(self.gate_up(x)))
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
        delta: Tensor | None,
        layer: int,
        attend: AttendFn,
        access: Access = NO_ACCESS,
        edits: SiteEdits = NO_EDITS,
    ) -> tuple[Tensor, Tensor]:
        """(resid_mid, mlp_out), whose sum is this block's resid_post.

        The residual entering the block is x + delta in the same way: the norm that reads the sum
        is the pass that forms it, edits it and writes it where it is tapped.
        """
        normed, x = self._normed(
            self.attn_norm, x, delta, layer, ("resid_pre", "attn_norm"), access, edits
        )
        attn_out = self.attn_norm.edited(
            self.attn(normed, layer, attend), edits.at(Tap(layer, "attn_out"))
        )
        access.read(Tap(layer, "attn_out"), attn_out)
        normed, x = self._normed(
            self.mlp_norm, x, attn_out, layer, ("resid_mid", "mlp_norm"), access, edits
        )
        mlp_out = self.mlp_norm.edited(self.mlp(normed), edits.at(Tap(layer, "mlp_out")))
        access.read(Tap(layer, "mlp_out"), mlp_out)
        return x, mlp_out

    @staticmethod
    def _normed(
        norm: RMSNorm,
        x: Tensor,
        delta: Tensor | None,
        layer: int,
        points: tuple[str, str],
        access: Access,
        edits: SiteEdits,
    ) -> tuple[Tensor, Tensor]:
        """(the norm's output, the residual it read), which are the two `points`.

        The last edit of the residual and the first of the output are made by the norm's own pass.
        """
        residual, output = (Tap(layer, point) for point in points)
        before, after = edits.at(residual), edits.at(output)
        if len(before) > 1:
            x, delta = norm.edited(x, before[:-1], delta), None
        normed, x = norm.of_sum(
            x,
            delta,
            before=before[-1] if before else None,
            after=after[0] if after else None,
            h_out=access.into(residual),
        )
        normed = norm.edited(normed, after[1:])
        access.read(residual, x)
        access.read(output, normed)
        return normed, x


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
        self.engine: object | None = None  # of the last generation: see `engine.py`

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
        counts: Tensor | None = None,
        start: int | None = None,
        access: Access = NO_ACCESS,
        edits: EditTable | None = None,
    ) -> Tensor:
        """Residual stream after the last block, before the final norm.

        token_ids [B, T] int64; with a cache they follow what each request already holds.
        counts [B] int64: how many of the T tokens of each request are real (default all); the
        rest is right padding whose output means nothing. start: the position of the first token of
        every request that has real ones, where it is the same for all: attention then needs no
        mask of its own for each request. access is shown the states on the way,
        edits change them. Returns [B, T, d]. Differentiable without a cache. Raises ValueError
        where the cache is too small.
        """
        n_tokens = token_ids.shape[1]
        if cache is None:
            positions = torch.arange(n_tokens, device=token_ids.device)[None]
            attend = causal_attention(self.rope(positions))
        else:
            positions = cache.next_positions(n_tokens)
            attend = cached_attention(cache, positions, self.rope(positions), start)
        at_sites = NO_EDITS if edits is None else edits.at(positions.expand_as(token_ids))
        x = self.through_blocks(token_ids, attend, access, at_sites)
        if cache is not None:
            longest = min(cache.capacity, cache.longest + n_tokens)
            cache.advance(n_tokens if counts is None else counts, longest)
        return x

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of absolute positions [B, T], as attention takes them."""
        self._inv_freq = self._inv_freq.to(positions.device)
        return rope_angles_reference(positions, self._inv_freq, self.dtype)

    def through_blocks(
        self,
        token_ids: Tensor,
        attend: AttendFn,
        access: Access = NO_ACCESS,
        edits: SiteEdits = NO_EDITS,
    ) -> Tensor:
        """`forward` with whatever attention: token_ids [B, T] -> [B, T, d]; edits of B · T rows."""
        x: Tensor = self.embed(token_ids)
        delta: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            x, delta = block(x, delta, layer, attend, access, edits)
        assert delta is not None
        last = Tap(len(self.blocks), "resid_pre")
        x = self.norm.edited(x + delta, edits.at(last))
        access.read(last, x)
        return x


def queries_keys_values(
    attn: Attention, qkv: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, heads, D] each, normed and turned; differentiable."""
    parts = qkv.split((attn.q_size, attn.kv_size, attn.kv_size), dim=-1)
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    if attn.q_norm is not None and attn.k_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    return rope_reference(q, *rope), rope_reference(k, *rope), v


def causal_attention(rope: tuple[Tensor, Tensor]) -> AttendFn:
    """Every token over those before it and itself; differentiable."""

    def attend(attn: Attention, layer: int, qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in queries_keys_values(attn, qkv, rope))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2)

    return attend


def cached_attention(
    cache: KVCache, positions: Tensor, rope: tuple[Tensor, Tensor], start: int | None = None
) -> AttendFn:
    """Tokens at absolute `positions` [B, T] over the cache, which they are written to first.

    start: see `Transformer.forward`. With it a token sees the cache up to the lower right diagonal
    of [T, S], which fused kernels know without a mask.
    """
    n_tokens = positions.shape[1]
    span = (cache.longest if start is None else start) + n_tokens
    lengths = positions[:, 0] + 1
    visible: Tensor | None = None
    if n_tokens > 1 and start is not None:
        visible = LowerRight(n_tokens, span)
    elif n_tokens > 1:
        index = torch.arange(span, device=positions.device)
        seen = index <= positions[..., None]  # [B, T, S]
        # of every request the mask for each of its key/value heads
        visible = seen.repeat_interleave(cache.keys.shape[2], 0)[:, None]

    def attend(attn: Attention, layer: int, qkv: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        norms = {}
        if attn.q_norm is not None and attn.k_norm is not None:
            norms = {"q_weight": attn.q_norm.weight, "k_weight": attn.k_norm.weight}
        q = rope_qk(qkv, *rope, keys, values, positions, eps=attn.eps, **norms)
        if visible is None:
            return decode_attention(q[:, 0], keys, values, lengths, span=span)[:, None]
        return grouped_attention(q, keys[:, :, :span], values[:, :, :span], visible)

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

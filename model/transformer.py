"""One decoder for every family. Shapes: B requests, T new tokens, d hidden size.

Sharding shows only in the sizes (`rank_spans`) and in the layer classes; the numbers that pass
between blocks are whole, and the same, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.swiglu import swiglu
from ..parallel.agreement import asked_alike
from ..parallel.group import TensorParallel
from ..parallel.linear import ColumnLinear, RowLinear
from ..parallel.spans import Span
from ..parallel.vocab import VocabEmbedding, VocabHead, vocab_rows
from .arguments import integers
from .attention import AttendFn, Attention, cached_attention, causal_attention
from .cache import KVCache
from .config import ModelConfig
from .norm import RMSNorm
from .points import Tap
from .rope import Rope
from .sharding import rank_spans
from .tap_edits import NO_EDITS, EditFn, TapEdits
from .tap_sink import NO_TAPS, TapSink


@dataclass(frozen=True)
class ForwardPass:
    """The parts of a pass beside the blocks' arithmetic, the same for all blocks."""

    attend: AttendFn
    sink: TapSink = NO_TAPS
    edits: TapEdits = NO_EDITS


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
        self, x: Tensor, delta: Tensor | None, layer: int, run: ForwardPass
    ) -> tuple[Tensor, Tensor]:
        """(resid_mid, mlp_out), whose sum is this block's resid_post.

        The residual entering the block is x + delta in the same way: the norm that reads the sum
        is the pass that forms it, edits it and writes it where it is tapped.
        """
        normed, x = _normed(
            self.attn_norm, x, delta, Tap(layer, "resid_pre"), Tap(layer, "attn_norm"), run
        )
        attn_out = self.attn(normed, layer, run.attend)
        attn_out = _written(self.attn_norm, attn_out, Tap(layer, "attn_out"), run)
        normed, x = _normed(
            self.mlp_norm, x, attn_out, Tap(layer, "resid_mid"), Tap(layer, "mlp_norm"), run
        )
        return x, _written(self.mlp_norm, self.mlp(normed), Tap(layer, "mlp_out"), run)


def _normed(
    norm: RMSNorm, x: Tensor, delta: Tensor | None, residual: Tap, output: Tap, run: ForwardPass
) -> tuple[Tensor, Tensor]:
    """(the norm's output, the residual x + delta that it read), which are tapped and edited.

    The last edit of the residual and the first of the output are made by the norm's own pass.
    """
    before, after = run.edits.at(residual), run.edits.at(output)
    if len(before) > 1:
        x, delta = norm.edited(x, before[:-1], delta), None
    normed, x = norm.of_sum(
        x,
        delta,
        before=before[-1] if before else None,
        after=after[0] if after else None,
        h_out=run.sink.into(residual),
    )
    normed = norm.edited(normed, after[1:])
    run.sink.read(residual, x)
    run.sink.read(output, normed)
    return normed, x


def _written(norm: RMSNorm, x: Tensor, tap: Tap, run: ForwardPass) -> Tensor:
    """The output of attention or MLP that is added to the residual, edited and tapped."""
    x = norm.edited(x, run.edits.at(tap))
    run.sink.read(tap, x)
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
        self.spans = rank_spans(config, parallel.rank, parallel.size)
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
        self._rope = Rope(config)

    def _tie_head(self) -> None:
        if self.config.tied_head:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        # to_empty, which turns meta tensors into real ones, would give the head a copy
        super()._apply(fn, recurse)
        self._tie_head()
        return self

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def embedding_rows(self, token_ids: int | Sequence[int] | Tensor) -> Tensor:
        """[N, d]: the embedding's rows of N token ids, the same on every rank.

        token_ids: a number, several, or a tensor [N]; every rank asks for the same. Raises
        ValueError for none, and for an id that the vocabulary does not have, padding included.
        """
        return self._rows(self.embed.weight, token_ids)

    def head_rows(self, token_ids: int | Sequence[int] | Tensor) -> Tensor:
        """[N, d]: rows of the unembedding, whose products with normed states are logits.

        Otherwise as `embedding_rows`, which gives the same where the head is tied.
        """
        return self._rows(self.head.weight, token_ids)

    def _rows(self, weight: Tensor, token_ids: int | Sequence[int] | Tensor) -> Tensor:
        with asked_alike(self.parallel) as asked:
            ids = integers(token_ids, "token_ids")
            if not ids:
                raise ValueError("no token id is given: name at least one")
            for token in ids:
                if not 0 <= token < self.config.vocab_size:
                    raise ValueError(
                        f"token id {token} is outside the vocabulary: give 0 to "
                        f"{self.config.vocab_size - 1}"
                    )
            if asked is not None:
                asked.add(weight is self.embed.weight, ids)
        on_device = torch.tensor(ids, device=self.device)
        return vocab_rows(weight, self.spans["vocab"], on_device, self.parallel)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for this rank's heads."""
        kv_heads = self.spans["kv_heads"].padded // self.config.head_dim
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
        n_tokens: int | None = None,
        sink: TapSink = NO_TAPS,
        edits: EditFn | None = None,
    ) -> Tensor:
        """Residual stream after the last block, before the final norm.

        token_ids [B, T] int64; with a cache they follow what each request already holds.
        counts [B] int64: how many of the T tokens of each request are real (default all); the
        rest is right padding whose output means nothing. start: the position of the first token of
        every request that has real ones, where it is the same for all: attention then needs no
        mask per request. n_tokens: how many tokens a text has that is read in chunks, default T.
        sink is handed the states on the way; edits, given absolute positions
        [B, T], returns what changes them. Returns [B, T, d]. Differentiable without a cache. Raises
        ValueError where the cache is too small.
        """
        n_new = token_ids.shape[1]
        n_tokens = n_new if n_tokens is None else n_tokens
        if cache is None:
            positions = torch.arange(n_new, device=token_ids.device)[None]
            attend = causal_attention(self.rope(positions, n_tokens))
        else:
            positions = cache.next_positions(n_new)
            attend = cached_attention(cache, positions, self.rope(positions, n_tokens), start)
        tap_edits = NO_EDITS if edits is None else edits(positions.expand_as(token_ids))
        x = self.through_blocks(token_ids, ForwardPass(attend, sink, tap_edits))
        if cache is not None:
            longest = min(cache.capacity, cache.longest + n_new)
            cache.advance(n_new if counts is None else counts, longest)
        return x

    def rope(self, positions: Tensor, n_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines of absolute positions [B, T] of a text of n_tokens read at once."""
        return self._rope(positions, self.dtype, n_tokens=n_tokens)

    def through_blocks(self, token_ids: Tensor, run: ForwardPass) -> Tensor:
        """`forward` with any attention: token_ids [B, T] -> [B, T, d]."""
        x: Tensor = self.embed(token_ids)
        delta: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            x, delta = block(x, delta, layer, run)
        assert delta is not None
        last = Tap(len(self.blocks), "resid_pre")
        x = self.norm.edited(x + delta, run.edits.at(last))
        run.sink.read(last, x)
        return x

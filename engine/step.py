"""One decode step with static buffers: feed a token per request, read the head, choose the next.

All that a step reads and writes lies in memory that stays where it is, so that on CUDA the step is
captured once, collectives included, and replayed; elsewhere the same code runs eagerly. Legend:
B slots, each for one request; P taps, d hidden size, G rows of a request in the head's product.

The lens is fused: tapped states are rows of the product that sampling needs anyway, which is bound
by reading the weight. A request's rows are

    [state to sample from]? [tap 0] ... [tap P - 1, the final layer]

and the final layer's row serves for sampling too, unless it must be scaled by a temperature. Where
a tap's target is the next token, its rank can be counted only once that token is known: then the
taps are rows of the product of the step after, whichever request has the slot by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.head_stats_reference import Noise
from ..model.cache import KVCache
from ..model.tap_sink import TapBuffer
from ..model.transformer import Transformer
from ..parallel.head_reduce import HeadResult, reduce_head
from .edit_table import EditTable, TableShape
from .lens_plan import LensPlan
from .limits import RING_TOKENS, rounded_up
from .record import pack_rows, record_width
from .request import Generation
from .sampling import GREEDY, Sampling, SamplingTable, candidates_needed, draw

LEAST_STOPS = 8  # ids that a slot has room for
NOT_KNOWN, NOT_FINITE = 1, 2  # bits of a record's flag


@dataclass(frozen=True)
class StepShape:
    """All that a captured step depends on, beside batch and capacity; the rest is in buffers."""

    lens: LensPlan | None
    draws: bool  # some request samples
    scaled: bool  # some temperature is neither 0 nor 1
    n_candidates: int  # that the draws look at
    n_stops: int  # of a request
    edits: TableShape | None

    @classmethod
    def of(
        cls,
        lens: LensPlan | None,
        samplings: Sequence[Sampling],
        edits: TableShape | None,
        n_stops: int,
        vocab_size: int,
    ) -> StepShape:
        return cls(
            lens=lens,
            draws=any(s.temperature > 0 for s in samplings),
            scaled=any(s.temperature not in (0, 1) for s in samplings),
            n_candidates=candidates_needed(samplings, vocab_size),
            n_stops=rounded_up(n_stops, LEAST_STOPS),
            edits=edits,
        )

    def covers(self, other: StepShape) -> bool:
        """Whether a step of this shape can do the work of one of the other shape."""
        is_alike = dataclasses.replace(self, edits=other.edits) == other
        if other.edits is None:
            return is_alike
        return is_alike and self.edits is not None and self.edits.covers(other.edits)

    @property
    def fused_lens(self) -> LensPlan | None:
        """The lens whose taps are rows of the steps' products."""
        return None if self.lens is None or self.lens.deferred else self.lens

    @property
    def lags_one_step(self) -> bool:
        """Whether taps are rows of the product of the step after theirs."""
        return self.fused_lens is not None and self.fused_lens.target == "next"

    @property
    def has_sample_row(self) -> bool:
        return self.fused_lens is None or self.lags_one_step or self.scaled

    @property
    def rows_per_request(self) -> int:
        return int(self.has_sample_row) + (
            0 if self.fused_lens is None else len(self.fused_lens.taps)
        )

    @property
    def sample_row(self) -> int:
        """Index among a request's rows of the one that is sampled from."""
        return 0 if self.has_sample_row else self.rows_per_request - 1

    @property
    def k(self) -> int:
        return max(self.n_candidates, 0 if self.fused_lens is None else self.fused_lens.top_k)


class DecodeStep:
    """The buffers of a batch, and the step over them.

    captured: whether the step is to be captured, and so launches the same whatever is edited.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, shape: StepShape, *, captured: bool = True
    ) -> None:
        self.model, self.cache, self.shape = model, cache, shape
        batch, d, device = cache.batch, model.config.d, model.device
        self.batch = batch

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.tokens = zeros(batch, dtype=torch.int64)  # chosen last, fed next
        self.n_drawn = zeros(batch, dtype=torch.int64)
        self.n_left = zeros(batch, dtype=torch.int64)  # tokens still wanted
        self.active = zeros(batch, dtype=torch.bool)
        self.stop_ids = zeros(batch, shape.n_stops, dtype=torch.int64)
        self.fixed_targets = zeros(batch, dtype=torch.int64)
        self.follows = zeros(batch, dtype=torch.bool)  # whether the target is the next token
        self.row_targets = zeros(batch, dtype=torch.int64)  # of taps that wait for their token
        self.sampling = SamplingTable(batch, model.config.vocab_size, device)
        self.states = zeros(batch, shape.rows_per_request, d, dtype=model.dtype)
        self.taps = self._tap_buffer()
        lens = shape.fused_lens
        n_numbers = 0 if lens is None else len(lens.taps) * record_width(lens.top_k)
        self.record = zeros(batch, 2 + n_numbers, dtype=torch.int32)
        self.edits: EditTable | None = None
        if shape.edits is not None:
            self.edits = EditTable(
                model.config,
                shape.edits,
                batch,
                cache.capacity,
                dtype=model.dtype,
                device=device,
                every_site=captured,
            )
        if shape.lens is not None and shape.lens.deferred:
            self.ring = zeros(RING_TOKENS, batch, len(shape.lens.taps), d, dtype=model.dtype)
            self.ring_targets = zeros(RING_TOKENS, batch, dtype=torch.int64)
            self.ring_index = zeros(1, dtype=torch.int64)

    def _tap_buffer(self) -> TapBuffer:
        """A separate buffer if the previous taps are still unread, else a view of the head rows."""
        lens = self.shape.lens
        if lens is None:
            return TapBuffer((), self.states)
        if self.shape.fused_lens is not None and not self.shape.lags_one_step:
            return TapBuffer(lens.taps, self.states[:, -len(lens.taps) :])
        size = (self.batch, len(lens.taps), self.states.shape[-1])
        return TapBuffer(lens.taps, self.states.new_zeros(size))

    def reset(self) -> None:
        """Empty all slots, and clear what was in them."""
        for buffer in (self.tokens, self.n_drawn, self.n_left, self.active, self.states):
            buffer.zero_()
        for buffer in (self.taps.states, self.cache.lengths):
            buffer.zero_()
        self.row_targets.fill_(-1)
        self.cache.longest = 0
        for slot in range(self.batch):
            self.sampling.put(slot, GREEDY)
            if self.edits is not None:
                self.edits.put(slot, None)
        if hasattr(self, "ring_index"):
            self.ring_index.zero_()

    def edit(self, slot: int, generation: Generation) -> None:
        """Put a request's edits into a slot."""
        if self.edits is not None:
            self.edits.put(slot, generation.edits)

    def start(self, slot: int, generation: Generation) -> None:
        """Give a slot to a request whose prompt is in the cache, but for the last token.

        Whatever is still to be read of the slot's last request is left alone.
        """
        self.cache.lengths[slot] = len(generation.prompt) - 1
        self.tokens[slot] = generation.prompt[-1]
        self.n_drawn[slot] = 0
        self.n_left[slot] = generation.max_new_tokens
        self.active[slot] = True
        self.stop_ids[slot] = -1
        stop_ids = sorted(generation.stop_ids)
        self.stop_ids[slot, : len(stop_ids)] = torch.tensor(stop_ids, dtype=torch.int64)
        record = generation.record
        self.fixed_targets[slot] = -1 if record is None else record.fixed_target
        self.follows[slot] = record is not None and record.spec.targets == "next"
        self.sampling.put(slot, generation.request.sampling)

    def run(self) -> None:
        """Feed the tokens, read the head, stash the taps that are read later."""
        self.feed()
        self.read()
        self.stash_taps()

    def feed(self) -> None:
        hidden = self.model(
            self.tokens[:, None],
            cache=self.cache,
            counts=self.active,
            sink=self.taps,
            edits=None if self.edits is None else self.edits.at,
        )
        self.taps.check()
        if self.shape.has_sample_row:
            self.states[:, 0] = hidden[:, 0]

    def read(self) -> None:
        """Choose each request's next token, and write the record of the step."""
        shape = self.shape
        noise = None
        if shape.draws:
            noise = Noise(self.sampling.seed, self.n_drawn, sample_row=shape.sample_row)
        result = reduce_head(
            self.model.norm(self.states).flatten(0, 1),
            self.model.head,
            k=shape.k,
            scale=self._scale(),
            target_ids=self._target_ids(),
            rows_per_request=shape.rows_per_request,
            noise=noise,
        )
        chosen = result.rows(slice(shape.sample_row, None, shape.rows_per_request))
        if shape.draws:
            assert result.samples is not None
            tokens, is_unknown = draw(chosen, result.samples, self.sampling, self.n_drawn)
        else:
            tokens, is_unknown = chosen.token_ids[:, 0], torch.zeros_like(self.active)
        self._write_record(result, tokens, is_unknown, chosen.logsumexp.isfinite())
        self.tokens.copy_(tokens)
        self.n_drawn += self.active
        self.n_left -= self.active.long()
        # not torch.isin, which sorts, and waits for the host, where there are many ids
        is_stop = (tokens[:, None] == self.stop_ids).any(-1)
        self.active &= (self.n_left > 0) & ~is_stop

    def stash_taps(self) -> None:
        """Stash the previous taps, now that the token after them is known."""
        lens = self.shape.lens
        if lens is None or not (lens.deferred or self.shape.lags_one_step):
            return
        targets = self.tokens.where(self.follows, self.fixed_targets)
        if lens.deferred:
            self.ring.index_copy_(0, self.ring_index, self.taps.states[None])
            self.ring_targets.index_copy_(0, self.ring_index, targets[None])
            self.ring_index.copy_((self.ring_index + 1) % RING_TOKENS)
        else:
            self.states[:, 1:] = self.taps.states
            self.row_targets.copy_(targets)

    def correct(self, slots: Tensor, tokens: Tensor) -> None:
        """Replace tokens [n] of slots [n] that the step could not know."""
        self.tokens[slots] = tokens
        targets = tokens.where(self.follows[slots], self.fixed_targets[slots])
        self.row_targets[slots] = targets
        if hasattr(self, "ring_index"):
            self.ring_targets[(self.ring_index - 1) % RING_TOKENS, slots] = targets

    def _scale(self) -> Tensor | None:
        if not self.shape.scaled:
            return None
        scale = torch.ones(self.batch, self.shape.rows_per_request, device=self.states.device)
        scale[:, 0] = self.sampling.scale
        return scale.flatten()

    def _target_ids(self) -> Tensor | None:
        lens = self.shape.fused_lens
        if lens is None or lens.target == "none":
            return None
        targets = self.row_targets if self.shape.lags_one_step else self.fixed_targets
        rows = targets[:, None].expand(-1, self.shape.rows_per_request)
        if self.shape.has_sample_row:
            is_tap = torch.arange(self.shape.rows_per_request, device=targets.device) > 0
            rows = rows.where(is_tap, -1)
        return rows.flatten()

    def _write_record(
        self, result: HeadResult, tokens: Tensor, is_unknown: Tensor, is_finite: Tensor
    ) -> None:
        self.record[:, 0] = tokens
        self.record[:, 1] = is_unknown * NOT_KNOWN + ~is_finite * NOT_FINITE
        lens = self.shape.fused_lens
        if lens is not None:
            rows = pack_rows(result, lens.top_k)
            rows = rows.unflatten(0, (self.batch, self.shape.rows_per_request))
            self.record[:, 2:] = rows[:, -len(lens.taps) :].flatten(1)

"""One decode step with static buffers: feed a token a request, read the head, choose the next.

All that a step reads and writes lies in memory that stays where it is, so that on CUDA the step is
captured once, collectives included, and replayed; elsewhere the same code runs eagerly. Legend:
B requests (padded to a bucket), P taps, d hidden size, G rows of a request in the head's product.

The lens rides along: tapped states are rows of the product that sampling needs anyway, which is
bound by reading the weight. A request's rows are

    [state to sample from]? [tap 0] ... [tap P - 1, the final layer]

and the final layer's row serves for sampling too, unless it must be scaled by a temperature. Where
a tap's target is the next token, its rank can be counted only once that token is known: then the
taps ride in the product of the step after, which is fed that token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.head_stats_reference import Noise
from ..model.cache import KVCache
from ..model.points import Tap
from ..model.tap_sink import TapBuffer
from ..model.transformer import Transformer
from ..parallel.head_reduce import Winners, reduce_head
from .edit_table import EditTable, TableShape
from .limits import RING_TOKENS, rounded_up
from .record import pack, width
from .sampling import Sampling, SamplingTable, draw, winners_needed
from .steering import Steering

TargetKind = Literal["none", "fixed", "next"]
LEAST_STOPS = 8  # ids that a step has room for
NOT_KNOWN, NOT_FINITE = 1, 2  # bits of a record's flag


@dataclass(frozen=True)
class Reader:
    """What is read of every step: taps, the last of which is the final layer's, and winners."""

    taps: tuple[Tap, ...]
    top_k: int
    target: TargetKind
    deferred: bool = False


@dataclass(frozen=True)
class StepShape:
    """What a captured step depends on, beside batch and capacity; all else is in its buffers."""

    reader: Reader | None
    draws: bool  # some request samples
    scaled: bool  # some temperature is neither 0 nor 1
    n_winners: int  # that the draws look at
    n_stops: int
    edits: TableShape | None

    @classmethod
    def of(
        cls,
        reader: Reader | None,
        samplings: Sequence[Sampling],
        edits: TableShape | None,
        n_stops: int,
        vocab_size: int,
    ) -> StepShape:
        return cls(
            reader=reader,
            draws=any(s.temperature > 0 for s in samplings),
            scaled=any(s.temperature not in (0, 1) for s in samplings),
            n_winners=winners_needed(samplings, vocab_size),
            n_stops=rounded_up(n_stops, LEAST_STOPS),
            edits=edits,
        )

    def covers(self, other: StepShape) -> bool:
        """Whether a step of this shape does what one of the other does."""
        is_alike = dataclasses.replace(self, edits=other.edits) == other
        if other.edits is None:
            return is_alike
        return is_alike and self.edits is not None and self.edits.covers(other.edits)

    @property
    def riding(self) -> Reader | None:
        """The reader whose taps ride in the steps' own products."""
        return None if self.reader is None or self.reader.deferred else self.reader

    @property
    def is_delayed(self) -> bool:
        """Whether taps ride in the product of the step after theirs."""
        return self.riding is not None and self.riding.target == "next"

    @property
    def has_own_row(self) -> bool:
        return self.riding is None or self.is_delayed or self.scaled

    @property
    def group(self) -> int:
        """Rows of a request."""
        return int(self.has_own_row) + (0 if self.riding is None else len(self.riding.taps))

    @property
    def sampled_place(self) -> int:
        return 0 if self.has_own_row else self.group - 1

    @property
    def k(self) -> int:
        return max(self.n_winners, 0 if self.riding is None else self.riding.top_k)


class DecodeStep:
    """The buffers of a batch, and the step over them."""

    def __init__(self, model: Transformer, cache: KVCache, shape: StepShape) -> None:
        self.model, self.cache, self.shape = model, cache, shape
        batch, d, device = cache.lengths.shape[0], model.config.d, model.device
        self.batch = batch

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.tokens = zeros(batch, dtype=torch.int64)  # chosen last, fed next
        self.n_drawn = zeros(batch, dtype=torch.int64)
        self.n_left = zeros(batch, dtype=torch.int64)  # tokens still wanted
        self.active = zeros(batch, dtype=torch.bool)
        self.stop_ids = zeros(shape.n_stops, dtype=torch.int64)
        self.targets = zeros(batch, dtype=torch.int64)
        self.sampling = SamplingTable(batch, model.config.vocab_size, device)
        self.states = zeros(batch, shape.group, d, dtype=model.dtype)
        self.taps = self._tap_buffer()
        n_rows = 0 if shape.riding is None else len(shape.riding.taps) * width(shape.riding.top_k)
        self.record = zeros(batch, 2 + n_rows, dtype=torch.int32)
        self.edits: EditTable | None = None
        if shape.edits is not None:
            self.edits = EditTable(
                model.config,
                shape.edits,
                batch,
                cache.capacity,
                dtype=model.dtype,
                device=device,
            )
        reader = shape.reader
        if reader is not None and reader.deferred:
            self.ring = zeros(RING_TOKENS, batch, len(reader.taps), d, dtype=model.dtype)
            self.ring_tokens = zeros(RING_TOKENS, batch, dtype=torch.int64)
            self.ring_at = zeros(1, dtype=torch.int64)

    def _tap_buffer(self) -> TapBuffer:
        """Of its own where the taps of the last step are still to be read, else the rows."""
        reader = self.shape.reader
        if reader is None:
            return TapBuffer((), self.states)
        if self.shape.riding is not None and not self.shape.is_delayed:
            return TapBuffer(reader.taps, self.states[:, -len(reader.taps) :])
        size = (self.batch, len(reader.taps), self.states.shape[-1])
        return TapBuffer(reader.taps, self.states.new_zeros(size))

    def start(
        self,
        samplings: Sequence[Sampling],
        steerings: Sequence[Sequence[Steering]],
        prompt_lengths: Sequence[int],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        target: int,
    ) -> None:
        """Set the tables for new requests, which take the first places of the batch."""
        n_requests = len(samplings)
        self.cache.reset()
        for buffer in (self.tokens, self.n_drawn, self.n_left, self.states, self.taps.states):
            buffer.zero_()
        self.n_left[:n_requests] = max_new_tokens
        self.active.zero_()
        self.active[:n_requests] = max_new_tokens > 0
        self.stop_ids.fill_(-1)
        if stop_ids:
            self.stop_ids[: len(stop_ids)] = torch.tensor(list(stop_ids), device=self.tokens.device)
        self.targets.fill_(target)
        self.sampling.fill(samplings)
        if self.edits is not None:
            idle = self.batch - n_requests
            self.edits.fill([*steerings, *[[]] * idle], [*prompt_lengths, *[0] * idle])
        if hasattr(self, "ring_at"):
            self.ring_at.zero_()

    def run(self) -> None:
        """Put the last taps by, feed the tokens, read the head."""
        self.retire()
        self.feed()
        self.read()

    def retire(self) -> None:
        """Make room for the next taps, once the token after them is known."""
        reader = self.shape.reader
        if reader is None:
            return
        if reader.deferred:
            self.ring.index_copy_(0, self.ring_at, self.taps.states[None])
            self.ring_tokens.index_copy_(0, self.ring_at, self.tokens[None])
            self.ring_at.copy_((self.ring_at + 1) % RING_TOKENS)
        elif self.shape.is_delayed:
            self.states[:, 1:] = self.taps.states

    def feed(self) -> None:
        hidden = self.model(
            self.tokens[:, None],
            cache=self.cache,
            counts=self.active,
            sink=self.taps,
            edits=self.edits,
        )
        if self.shape.has_own_row:
            self.states[:, 0] = hidden[:, 0]

    def read(self) -> None:
        """Choose each request's next token, and write the record of the step."""
        shape = self.shape
        noise = None
        if shape.draws:
            noise = Noise(self.sampling.seed, self.n_drawn, place=shape.sampled_place)
        winners = reduce_head(
            self.model.norm(self.states).flatten(0, 1),
            self.model.head,
            k=shape.k,
            scale=self._scale(),
            target_ids=self._target_ids(),
            group_size=shape.group,
            noise=noise,
        )
        chosen = _rows_at(winners, shape.sampled_place, shape.group)
        if shape.draws:
            tokens, is_unknown = draw(chosen, self.sampling, self.n_drawn)
        else:
            tokens, is_unknown = chosen.token_ids[:, 0], torch.zeros_like(self.active)
        self._write_record(winners, tokens, is_unknown, chosen.logsumexp.isfinite())
        self.tokens.copy_(tokens)
        self.n_drawn += self.active
        self.n_left -= self.active.long()
        # not torch.isin, which sorts, and waits for the host, where there are many ids
        is_stop = (tokens[:, None] == self.stop_ids).any(-1)
        self.active &= (self.n_left > 0) & ~is_stop

    def _scale(self) -> Tensor | None:
        if not self.shape.scaled:
            return None
        scale = torch.ones(self.batch, self.shape.group, device=self.states.device)
        scale[:, 0] = self.sampling.scale
        return scale.flatten()

    def _target_ids(self) -> Tensor | None:
        reader = self.shape.riding
        if reader is None or reader.target == "none":
            return None
        own = self.tokens if reader.target == "next" else self.targets
        rows = own[:, None].expand(-1, self.shape.group)
        if self.shape.has_own_row:
            is_tap = torch.arange(self.shape.group, device=own.device) > 0
            rows = rows.where(is_tap, -1)
        return rows.flatten()

    def _write_record(
        self, winners: Winners, tokens: Tensor, is_unknown: Tensor, is_finite: Tensor
    ) -> None:
        self.record[:, 0] = tokens
        self.record[:, 1] = is_unknown * NOT_KNOWN + ~is_finite * NOT_FINITE
        reader = self.shape.riding
        if reader is not None:
            rows = pack(winners, reader.top_k).unflatten(0, (self.batch, self.shape.group))
            self.record[:, 2:] = rows[:, -len(reader.taps) :].flatten(1)


def _rows_at(winners: Winners, place: int, group: int) -> Winners:
    """Of each group the row at `place`; keys are of these rows already."""
    return Winners(
        **{
            name: value if name.startswith("key_") else value[place::group]
            for name, value in vars(winners).items()
        }
    )

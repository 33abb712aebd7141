"""The generation loop: prefill in chunks, then one token per request and step.

The host only launches steps and takes in their records: with captured steps it looks at a record
while the step after it runs, so the device never waits for it. The test for stop tokens is part of
the step; the host's own runs one step behind, and throws away what came too much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..model.tap_sink import NO_TAPS, RowTaps
from ..model.transformer import Transformer
from .edit_table import TableShape
from .engine import Engine, HostCopy
from .limits import CAPTURED_ROWS, PREFILL_CHUNK, RING_TOKENS
from .record import width
from .sampling import Sampling, draw_wide
from .steering import Steering
from .step import NOT_FINITE, NOT_KNOWN, Reader, StepShape

Place = tuple[int, int]  # (request, absolute position)


class Observer(Protocol):
    """Reads hidden states while a model runs, e.g. a lens."""

    reader: Reader
    reads_steps: bool  # whether it wants positions from the prompt's last on
    fixed_target: int  # where reader.target is "fixed"

    def wants(self, position: int, prompt_length: int) -> bool:
        """Whether it wants a position of the prompt."""
        ...

    def decode(self, states: Tensor, following: Tensor) -> Tensor:
        """What there is to say of states [N, P, d], each followed by a token of `following` [N]
        (-1 for none): [N, P, width] int32, see `reading.py`. It must not wait for results.
        """
        ...

    def take(self, places: list[Place], rows: Tensor) -> None:
        """Rows [N, P, width] on the host, of N places, in order of position for each request."""
        ...


# (request, token id) as soon as a token is known on the host
OnToken = Callable[[int, int], None]
# (positions fed to the model so far, the most there can be)
OnProgress = Callable[[int, int], None]


@torch.inference_mode()
def generate_tokens(
    model: Transformer,
    sequences: list[list[int]],
    *,
    max_new_tokens: int,
    samplings: Sequence[Sampling],
    stop_ids: frozenset[int] = frozenset(),
    steerings: Sequence[Sequence[Steering]] | None = None,
    observer: Observer | None = None,
    on_token: OnToken | None = None,
    on_progress: OnProgress | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    capture: bool = True,
) -> None:
    """Extend `sequences` (prompts as token ids) in place by up to max_new_tokens each.

    A request ends with a token of `stop_ids`, which is kept. Every rank runs the same loop and
    gets the same tokens. The last token of a request is never fed back, so the observer does not
    see its position. steerings: edits of each request. capture: whether steps are captured as
    CUDA graphs where they can be. Raises ValueError for an empty prompt, an id outside the
    vocabulary, a prompt that with max_new_tokens exceeds the model's context, an edit that does
    not fit the model, and logits that are not finite.
    """
    check_prompts(model, sequences, max_new_tokens)
    edits = [[]] * len(sequences) if steerings is None else steerings
    for own in edits:
        for steering in own:
            steering.check(model.config)
    run = _Run(
        model, sequences, max_new_tokens, samplings, stop_ids, edits, observer, on_token, capture
    )
    run.prefill(prefill_chunk, on_progress)
    if max_new_tokens:
        run.decode(on_progress)
    run.finish()


def check_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} is below 0")
    if not prompts:
        raise ValueError("there is no prompt")
    for number, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt:
            raise ValueError(f"{name} is empty: give at least one token")
        outside = [token for token in prompt if not 0 <= token < model.config.vocab_size]
        if outside:
            raise ValueError(
                f"{name} holds token id {outside[0]}, outside the vocabulary "
                f"of {model.config.vocab_size}"
            )
        if len(prompt) + max_new_tokens > model.config.context:
            raise ValueError(
                f"{name} has {len(prompt)} tokens; with {max_new_tokens} new ones that exceeds "
                f"the model's context of {model.config.context}"
            )


class _Run:
    """A batch in flight. Turn t is the t-th reading of the head: it chooses each t-th new token."""

    def __init__(
        self,
        model: Transformer,
        sequences: list[list[int]],
        max_new_tokens: int,
        samplings: Sequence[Sampling],
        stop_ids: frozenset[int],
        steerings: Sequence[Sequence[Steering]],
        observer: Observer | None,
        on_token: OnToken | None,
        capture: bool,
    ) -> None:
        self.model, self.sequences, self.observer = model, sequences, observer
        self.max_new_tokens, self.stop_ids, self.on_token = max_new_tokens, stop_ids, on_token
        self.prompts = [list(sequence) for sequence in sequences]
        self.longest = max(map(len, sequences))
        self.capacity = self.longest + max_new_tokens
        self.reads_steps = observer is not None and observer.reads_steps and max_new_tokens > 0
        reader = observer.reader if observer is not None and self.reads_steps else None
        engine = Engine.of(model, len(sequences), self.capacity, capture)
        lengths = [len(prompt) for prompt in self.prompts]
        edits = TableShape.of(steerings, lengths, engine.cache.capacity, model.config)
        shape = StepShape.of(reader, samplings, edits, len(stop_ids), model.config.vocab_size)
        self.runner = engine.step(shape)
        self.step = self.runner.step
        if max_new_tokens > 1:
            self.runner.prepare()
        self.step.start(
            samplings,
            steerings,
            lengths,
            max_new_tokens,
            sorted(stop_ids),
            -1 if observer is None else observer.fixed_target,
        )
        # A nucleus may turn out wider than the winners at hand: then the host finds the token,
        # and must do so before the next step.
        is_behind = model.device.type == "cuda" and all(s.top_p == 1 for s in samplings)
        self.steps_behind = int(is_behind)
        self.pending: deque[tuple[HostCopy, Callable[[Tensor], None]]] = deque()
        self.alive = set(range(len(sequences)))
        self.got: set[int] = set()  # a token, at the turn that was taken in last
        self.waiting: tuple[list[Place], Tensor] | None = None
        self.n_retired = 0

    # Prefill

    def prefill(self, chunk: int, on_progress: OnProgress | None) -> None:
        """Feed all prompts; the step's buffers then hold the state at each one's last token."""
        n_requests = len(self.prompts)
        cache = self.step.cache.first(n_requests)
        edits = None if self.step.edits is None else self.step.edits.first(n_requests)
        if self.observer is not None:
            rows_a_position = n_requests * len(self.observer.reader.taps)
            chunk = min(chunk, max(1, CAPTURED_ROWS // rows_a_position))
        for start in range(0, self.longest, chunk):
            n_tokens = min(chunk, self.longest - start)
            parts = [prompt[start : start + n_tokens] for prompt in self.prompts]
            padded = [[*part, *[0] * (n_tokens - len(part))] for part in parts]
            counts = [len(part) for part in parts]
            ends = [
                request
                for request, prompt in enumerate(self.prompts)
                if start < len(prompt) <= start + n_tokens
            ]
            places = self._observed(start, counts)
            capture = self._capture([*places, *self._last_places(ends)], start, n_tokens)
            hidden = self.model(
                torch.tensor(padded, device=self.model.device),
                cache=cache,
                counts=torch.tensor(counts, device=self.model.device),
                start=start,
                sink=capture or NO_TAPS,
                edits=edits,
            )
            cache.longest = min(self.longest, start + n_tokens)
            self._keep_last(ends, start, hidden, capture, len(places))
            if capture is not None and places:
                self._decode_prompt(places, capture.states[: len(places)])
            if on_progress is not None:
                on_progress(cache.longest, self.capacity)
        self.step.cache.longest = self.longest

    def _observed(self, start: int, counts: Sequence[int]) -> list[Place]:
        """Places of a chunk whose following token the prompt holds, or that nothing follows."""
        if self.observer is None:
            return []
        return [
            (request, position)
            for request, (prompt, count) in enumerate(zip(self.prompts, counts, strict=True))
            for position in range(start, start + count)
            if (position < len(prompt) - 1 or not self.max_new_tokens)
            and self.observer.wants(position, len(prompt))
        ]

    def _last_places(self, ends: Sequence[int]) -> list[Place]:
        """The last places of prompts, where they are read once the first new token is known."""
        if self.observer is None or not self.max_new_tokens:
            return []
        lengths = [len(self.prompts[request]) for request in ends]
        return [
            (request, length - 1)
            for request, length in zip(ends, lengths, strict=True)
            if self.reads_steps or self.observer.wants(length - 1, length)
        ]

    def _capture(self, places: list[Place], start: int, n_tokens: int) -> RowTaps | None:
        if not places or self.observer is None:
            return None
        rows = [request * n_tokens + position - start for request, position in places]
        return RowTaps(
            self.observer.reader.taps,
            torch.tensor(rows, device=self.model.device),
            self.model.config.d,
            dtype=self.model.dtype,
        )

    def _keep_last(
        self,
        ends: list[int],
        start: int,
        hidden: Tensor,
        capture: RowTaps | None,
        n_decoded: int,
    ) -> None:
        for request in ends:
            at = len(self.prompts[request]) - 1 - start
            self.step.states[request, self.step.shape.sampled_place] = hidden[request, at]
        if capture is None or capture.states.shape[0] == n_decoded:
            return
        states = capture.states[n_decoded:]
        if self.reads_steps:
            self.step.taps.states[ends] = states
            return
        places = self._last_places(ends)
        if self.waiting is not None:
            places, states = [*self.waiting[0], *places], torch.cat((self.waiting[1], states))
        self.waiting = places, states.clone()

    def _decode_prompt(self, places: list[Place], states: Tensor) -> None:
        """Have the observer decode states whose following tokens are in the sequences by now."""
        assert self.observer is not None
        following = [
            self.sequences[request][position + 1]
            if position + 1 < len(self.sequences[request])
            else -1
            for request, position in places
        ]
        rows = self.observer.decode(states, torch.tensor(following, device=states.device))
        self._queue(rows, lambda at_host: self._take(places, at_host))
        self._settle(self.steps_behind)

    # Decode

    def decode(self, on_progress: OnProgress | None) -> None:
        self.step.read()
        self._queue_record(0)
        for turn in range(1, self.max_new_tokens):
            self._settle(self.steps_behind)
            if not self.alive:
                break
            self.runner.run()
            self._queue_record(turn)
            self._after_retiring()
            if on_progress is not None:
                on_progress(self.longest + turn, self.capacity)
        self._settle(0)
        if self.reads_steps:
            self._flush()

    def finish(self) -> None:
        if self.waiting is not None:
            self._decode_prompt(*self.waiting)
        self._settle(0)

    def _queue(self, source: Tensor, then: Callable[[Tensor], None]) -> None:
        self.pending.append((HostCopy(source), then))

    def _queue_record(self, turn: int) -> None:
        self._queue(self.step.record, lambda record: self._take_record(record, turn))

    def _settle(self, left: int) -> None:
        """Take in what arrived, oldest first, but for the last `left` of it."""
        while len(self.pending) > left:
            copied, then = self.pending.popleft()
            then(copied.wait())

    def _take_record(self, record: Tensor, turn: int) -> None:
        tokens, flags = record[:, :2].T.tolist()
        alive = sorted(self.alive)
        if any(flags[request] & NOT_FINITE for request in alive):
            raise ValueError("the logits are not finite: run the model in bfloat16 or float32")
        unknown = [request for request in alive if flags[request] & NOT_KNOWN]
        if unknown:
            for request, token in zip(unknown, self._found(unknown, turn), strict=True):
                tokens[request] = token
        got, self.got = self.got, self.alive.copy()
        for request in alive:
            self._append(request, tokens[request])
        if unknown:
            still = torch.tensor([request in self.alive for request in unknown])
            self.step.active[unknown] = still.to(self.step.active.device)
        self._take_lens(record, turn, got)

    def _append(self, request: int, token: int) -> None:
        sequence = self.sequences[request]
        sequence.append(token)
        if self.on_token is not None:
            self.on_token(request, token)
        n_new = len(sequence) - len(self.prompts[request])
        if token in self.stop_ids or n_new == self.max_new_tokens:
            self.alive.discard(request)

    def _found(self, requests: list[int], turn: int) -> list[int]:
        """Tokens whose nucleus was too wide for the step; it is told them too."""
        step, rows = self.step, torch.tensor(requests, device=self.model.device)
        states = self.model.norm(step.states[rows, step.shape.sampled_place])
        tokens = draw_wide(
            states, self.model.head, step.sampling, torch.full_like(rows, turn), rows
        )
        step.tokens[rows] = tokens
        return [int(token) for token in tokens.tolist()]

    def _take_lens(self, record: Tensor, turn: int, got_before: set[int]) -> None:
        reader = self.step.shape.riding
        if reader is None:
            return
        delay = int(self.step.shape.is_delayed)
        requests = sorted(got_before if delay else self.got)
        places = [(request, self._position(request, turn - delay)) for request in requests]
        rows = record[requests, 2:].unflatten(1, (len(reader.taps), width(reader.top_k)))
        self._take(places, rows)

    def _position(self, request: int, turn: int) -> int:
        """The one whose following token was chosen at that turn."""
        return len(self.prompts[request]) - 1 + turn

    def _take(self, places: list[Place], rows: Tensor) -> None:
        if places:
            assert self.observer is not None
            self.observer.take(places, rows)

    def _after_retiring(self) -> None:
        self.n_retired += 1
        reader = self.step.shape.reader
        if reader is not None and reader.deferred and self.n_retired % RING_TOKENS == 0:
            self._queue_ring(RING_TOKENS)

    def _queue_ring(self, n_steps: int) -> None:
        """Decode the last n_steps that were retired, of all requests."""
        assert self.observer is not None
        n_requests, first = len(self.prompts), self.n_retired - n_steps
        states = self.step.ring[:n_steps, :n_requests].flatten(0, 1)
        rows = self.observer.decode(states, self.step.ring_tokens[:n_steps, :n_requests].flatten())

        def then(at_host: Tensor) -> None:
            by_step = at_host.unflatten(0, (n_steps, n_requests))
            for request in range(n_requests):
                n_new = len(self.sequences[request]) - len(self.prompts[request])
                n_real = max(0, min(n_steps, n_new - first))
                turns = range(first, first + n_real)
                places = [(request, self._position(request, turn)) for turn in turns]
                self._take(places, by_step[:n_real, request])

        self._queue(rows, then)

    def _flush(self) -> None:
        """Read the taps of the last turn, which nothing was fed after."""
        shape = self.step.shape
        if shape.is_delayed and self.got:
            turn = self.n_retired + 1
            self.step.retire()
            self.step.read()
            self._queue_record(turn)
        elif shape.reader is not None and shape.reader.deferred:
            self.step.retire()
            self._after_retiring()
            if self.n_retired % RING_TOKENS:
                self._queue_ring(self.n_retired % RING_TOKENS)
        self._settle(0)

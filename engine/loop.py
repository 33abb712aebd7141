"""The loop: give free slots to waiting requests, run a step, process the tokens it chose.

The host only launches steps and processes their records: with captured steps it reads a record
while the next step runs, so the device never waits for it. The test for stop tokens is part of the
step; the host repeats it one step behind, and discards the surplus.

A slot is free as soon as its request needs no further step, and is reset alone. Prompts are fed one
by one, and a step has the same number of rows whoever is in its slots: what a request gets depends
neither on its slot, nor on the order of requests, nor on those beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .host_copy import HostCopy
from .lens_plan import LensPlan
from .lens_rows import read_states
from .limits import RING_TOKENS
from .not_finite import NotFinite
from .prefill import prefill
from .record import first_not_finite, record_width
from .request import Generation, OnProgress, OnToken
from .runner import StepRunner
from .sampling import draw_wide
from .step import NOT_FINITE, NOT_KNOWN

# per slot: the request that was fed a token, and that token's position
Fed = list[tuple[Generation, int] | None]


class Loop:
    """Runs generations to their end in the slots of one step."""

    def __init__(
        self,
        runner: StepRunner,
        generations: Sequence[Generation],
        n_slots: int,
        prefill_chunk: int,
        on_token: OnToken | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.runner, self.step, self.model = runner, runner.step, runner.step.model
        self.waiting = deque(generations)
        self.slots: list[Generation | None] = [None] * n_slots
        self.lens, self.prefill_chunk = self.step.shape.lens, prefill_chunk
        self.on_token, self.on_progress = on_token, on_progress
        # A nucleus may turn out wider than the candidates that a step keeps: then the host finds
        # the token, and must do so before the next step.
        has_nucleus = any(g.request.sampling.top_p < 1 for g in generations)
        self.steps_behind = int(self.model.device.type == "cuda" and not has_nucleus)
        self.pending: deque[tuple[HostCopy, Callable[[Tensor], None]]] = deque()
        self.unread: Fed = [None] * n_slots  # taps that the next product reads
        self.ring: list[Fed] = []
        self.n_fed, self.n_most = 0, sum(len(g.prompt) + g.max_new_tokens for g in generations)

    def run(self) -> None:
        """Run until every request has its tokens, and its lens has read them."""
        while self.waiting or any(self.slots):
            self.admit()
            if any(self.slots):
                self.run_step()
            self.drain(self.steps_behind)
            if len(self.ring) == RING_TOKENS:
                self.read_ring()
        self.drain(0)
        self.read_last_taps()
        self.drain(0)

    def admit(self) -> None:
        """Feed the prompts of waiting requests into free slots."""
        for slot, occupant in enumerate(self.slots):
            while occupant is None and self.waiting:
                occupant = self.start(slot, self.waiting.popleft())
            self.slots[slot] = occupant

    def run_step(self) -> None:
        """Launch one step, and queue its record."""
        self.step.cache.longest = max(g.n_cached for g in self.slots if g is not None)
        self.runner.run()
        occupants = list(self.slots)
        fed: Fed = [None if g is None else (g, g.n_cached) for g in occupants]
        for slot, generation in enumerate(occupants):
            if generation is not None:
                generation.n_launched += 1
                self.report(1)
                if generation.n_launched == generation.max_new_tokens:
                    self.slots[slot] = None
        lags = self.step.shape.lags_one_step
        self.queue_record(occupants, self.unread if lags else fed)
        self.unread = fed
        if self.lens is not None and self.lens.deferred:
            self.ring.append(fed)

    def drain(self, left: int) -> None:
        """Process pending records, oldest first, all but the last `left`."""
        while len(self.pending) > left:
            copied, then = self.pending.popleft()
            then(copied.wait())

    # Prefill

    def start(self, slot: int, generation: Generation) -> Generation | None:
        """Feed a prompt; the request, or None where it needs no step.

        The last token is left to the first step, whose product chooses the next one, unless there
        is no step, or the lens reads that position but none after it.
        """
        record = generation.record
        length = len(generation.prompt)
        holds_last = record is not None and not record.reads_steps
        feeds_all = not generation.max_new_tokens or holds_last
        self.step.edit(slot, generation)
        edits = self.step.edits
        prefill(
            self.model,
            self.step.cache.slot(slot),
            generation.prompt[: length if feeds_all else length - 1],
            n_tokens=length,
            chunk=self.prefill_chunk,
            edits=None if edits is None else edits.slot(slot).at,
            plan=None if record is None else record.plan,
            wants=lambda position: record is not None and record.wants(position, length),
            on_states=lambda positions, states: self.read_prompt(generation, positions, states),
            on_chunk=self.report,
        )
        if not generation.max_new_tokens:
            return None
        self.step.start(slot, generation)
        return generation

    def read_prompt(self, generation: Generation, positions: list[int], states: Tensor) -> None:
        """Decode states of a prompt, except the last where its next token is not chosen yet."""
        if generation.max_new_tokens and positions[-1] == len(generation.prompt) - 1:
            generation.held_state = states[-1:].clone()
            positions, states = positions[:-1], states[:-1]
        if positions:
            self.decode(generation, positions, states)
            self.drain(self.steps_behind)

    def decode(self, generation: Generation, positions: list[int], states: Tensor) -> None:
        """Queue the lens of states [n, P, d] at positions whose next tokens are known."""
        record = generation.record
        assert record is not None
        targets = [record.target(generation.token_at(position + 1)) for position in positions]
        on_device = None
        if record.spec.targets is not None:
            on_device = torch.tensor(targets, device=states.device)
        rows = read_states(self.model, record.plan, states, on_device)
        self.queue(rows, partial(self.keep, generation, record.plan, positions, targets))

    def keep(
        self,
        generation: Generation,
        plan: LensPlan,
        positions: list[int],
        targets: list[int],
        rows: Tensor,
    ) -> None:
        """Give a request the rows [n, taps of the plan, width] of some positions."""
        record = generation.record
        assert record is not None
        rows = record.chosen(plan, rows)
        bad = first_not_finite(rows)
        if bad is not None:
            raise NotFinite(generation, positions[bad[0]], record.taps[bad[1]])
        record.add(positions, targets, rows)

    # Records of steps

    def queue(self, source: Tensor, then: Callable[[Tensor], None]) -> None:
        self.pending.append((HostCopy(source), then))

    def queue_record(self, occupants: list[Generation | None], read: Fed) -> None:
        self.queue(self.step.record, lambda record: self.take_record(record, occupants, read))

    def take_record(self, record: Tensor, occupants: list[Generation | None], read: Fed) -> None:
        """Give tokens to the requests that were in the slots, and rows to those that were read."""
        tokens, flags = record[:, :2].T.tolist()
        live = {
            slot: generation
            for slot, generation in enumerate(occupants)
            if generation is not None and generation.finish_reason is None
        }
        for slot, generation in live.items():
            if flags[slot] & NOT_FINITE:
                raise NotFinite(generation, len(generation.prompt) + len(generation.tokens) - 1)
        unknown = {slot: g for slot, g in live.items() if flags[slot] & NOT_KNOWN}
        for slot, token in zip(unknown, self.drawn_wide(unknown), strict=True):
            tokens[slot] = token
        for slot, generation in live.items():
            self.append(slot, generation, tokens[slot])
        if unknown:
            still = [generation.finish_reason is None for generation in unknown.values()]
            self.step.active[list(unknown)] = torch.tensor(still).to(self.step.active.device)
        if self.step.shape.fused_lens is not None:
            self.take_rows(self.step.shape.fused_lens, read, record[:, 2:])

    def append(self, slot: int, generation: Generation, token: int) -> None:
        generation.append(token)
        if self.on_token is not None:
            self.on_token(generation.number, token)
        if generation.finish_reason is not None and self.slots[slot] is generation:
            self.slots[slot] = None
            self.step.active[slot] = False  # the step knows only the end by a token's id
        if generation.held_state is not None:
            state, generation.held_state = generation.held_state, None
            self.decode(generation, [len(generation.prompt) - 1], state)

    def drawn_wide(self, generations: dict[int, Generation]) -> list[int]:
        """Draw the tokens whose nucleus was too wide for the step, and write them into the step."""
        if not generations:
            return []
        step = self.step
        slots = torch.tensor(list(generations), device=self.model.device)
        n_drawn = torch.tensor([len(g.tokens) for g in generations.values()], device=slots.device)
        states = self.model.norm(step.states[slots, step.shape.sample_row])
        tokens = draw_wide(states, self.model.head, step.sampling, n_drawn, slots)
        step.correct(slots, tokens)
        return [int(token) for token in tokens.tolist()]

    def take_rows(self, plan: LensPlan, read: Fed, rows: Tensor) -> None:
        """Give rows [B, P · width] to the requests that want them and have the following token."""
        shape = (len(plan.taps), record_width(plan.top_k))
        for slot, entry in enumerate(read):
            if entry is not None:
                generation, position = entry
                record, following = generation.record, generation.token_at(position + 1)
                if record is not None and record.reads_steps and following >= 0:
                    packed = rows[slot : slot + 1].unflatten(1, shape)
                    self.keep(generation, plan, [position], [record.target(following)], packed)

    def read_last_taps(self) -> None:
        """Read the taps of the last step, which has no step after it to read them."""
        if self.ring:
            self.read_ring()
        elif self.step.shape.lags_one_step and any(
            entry is not None and entry[0].token_at(entry[1] + 1) >= 0 for entry in self.unread
        ):
            self.step.read()
            self.queue_record([None] * len(self.slots), self.unread)

    def read_ring(self) -> None:
        """Decode the states of the last steps together."""
        plan, steps, self.ring = self.lens, self.ring, []
        assert plan is not None
        states = self.step.ring[: len(steps)].flatten(0, 1)
        rows = read_states(self.model, plan, states, self.step.ring_targets[: len(steps)].flatten())

        def then(host_rows: Tensor) -> None:
            by_step = host_rows.unflatten(0, (len(steps), -1)).flatten(2)
            for fed, step_rows in zip(steps, by_step, strict=True):
                self.take_rows(plan, fed, step_rows)

        self.queue(rows, then)

    def report(self, n_positions: int) -> None:
        self.n_fed += n_positions
        if self.on_progress is not None:
            self.on_progress(self.n_fed, self.n_most)

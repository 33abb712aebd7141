"""Runs requests on a model, as many at once as fit, in steps that are captured where they can be.

A step is captured once for each batch and shape (`StepShape`). Vectors, scales, positions, targets,
seeds and stop ids lie in the step's buffers, so changing them captures nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..model.arguments import integer
from ..model.transformer import Transformer
from ..parallel.agreement import asked_alike
from .asked import add_requests
from .edit_table import TableShape
from .fit import Target, largest_batch
from .lens_plan import LensPlan
from .limits import PREFILL_CHUNK, batch_bucket, cache_capacity
from .loop import Loop
from .not_finite import NotFinite, cause
from .request import Generation, OnProgress, OnToken, Request
from .runner import StepRunner
from .step import DecodeStep, StepShape

# (request, newly read positions, their targets, packed rows [T, P, width])
OnRows = Callable[[Generation, list[int], list[int], Tensor], None]


class StepCache:
    """The keys and values of a batch, and the steps over them by shape."""

    def __init__(self, model: Transformer, batch: int, capacity: int, *, capture: bool) -> None:
        self.model, self.capture = model, capture
        self.cache = model.new_cache(batch, capacity)
        self.steps: dict[StepShape, StepRunner] = {}

    def fits(self, batch: int, n_tokens: int, capture: bool) -> bool:
        """Whether it can serve `batch` requests of up to n_tokens each."""
        keys = self.cache.keys
        return (
            (self.cache.batch, keys.dtype, keys.device)
            == (batch, self.model.dtype, self.model.device)
            and self.cache.capacity >= n_tokens
            and self.capture == capture
        )

    def step(self, shape: StepShape) -> StepRunner:
        """The step for a shape, made when it is first asked for.

        A step that can edit more will do: with empty tables it edits nothing.
        """
        for known, runner in self.steps.items():
            if known.covers(shape):
                return runner
        is_captured = self.capture and self.model.device.type != "cpu"
        step = DecodeStep(self.model, self.cache, shape, captured=is_captured)
        self.steps[shape] = StepRunner(step, self.capture)
        return self.steps[shape]


class Engine:
    """Runs requests on one model; on CUDA it keeps its memory and its graphs between calls."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.kept: StepCache | None = None

    @torch.inference_mode()
    def run(
        self,
        requests: Sequence[Request],
        *,
        max_batch: int | None = None,
        on_token: OnToken | None = None,
        on_rows: OnRows | None = None,
        on_progress: OnProgress | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        capture: bool = True,
    ) -> list[Generation]:
        """Continue each request; returns their generations, in order.

        max_batch: most requests that run at once, default as many as fit the memory; the others
        wait for a slot. on_rows: gets the rows that lenses read, which are then not kept. Every
        rank runs the same loop and gets the same tokens. The last token is not fed back, so no lens
        sees that position. capture: whether steps are captured as CUDA graphs where they
        can be. Raises ValueError for no request, a prompt that is empty, too long or of another
        vocabulary, an edit or a lens that does not fit the model, a max_batch below 1, ranks that
        are asked for different things, and numbers that are not finite, saying what caused them.
        """
        with asked_alike(self.model.parallel) as asked:
            generations = self._checked(requests, on_rows)
            if max_batch is not None:
                max_batch = integer(max_batch, "max_batch")
                if max_batch < 1:
                    raise ValueError(f"max_batch {max_batch} is below 1")
            if asked is not None:
                asked.add(max_batch, prefill_chunk, capture)
                add_requests(asked, generations)
        if max_batch is None:
            max_batch = self._largest_batch(generations, capture)
        n_slots = min(len(generations), max_batch)
        steps = self._steps(generations, n_slots, capture)
        for generation in generations:
            generation.arrange_edits(steps.cache.capacity)
        try:
            runner = steps.step(self._shape(generations))
            if any(generation.max_new_tokens > 1 for generation in generations):
                runner.prepare()
            runner.step.reset()
            Loop(runner, generations, n_slots, prefill_chunk, on_token, on_progress).run()
        except NotFinite as found:
            self.kept = None  # what is in its memory may not be finite
            is_alone = len(generations) == 1
            raise ValueError(cause(found, runner.step, is_alone=is_alone)) from None
        except BaseException:
            self.kept = None
            raise
        return generations

    def _checked(self, requests: Sequence[Request], on_rows: OnRows | None) -> list[Generation]:
        if not requests:
            raise ValueError("there is no prompt")
        config = self.model.config
        generations = []
        for number, request in enumerate(requests):
            generation = Generation(number, request, config)
            generation.check("the prompt" if len(requests) == 1 else f"prompt {number}")
            if on_rows is not None and generation.record is not None:
                generation.record.on_rows = partial(on_rows, generation)
            generations.append(generation)
        return generations

    def _largest_batch(self, generations: Sequence[Generation], capture: bool) -> int:
        model = self.model
        target = Target(model.parallel, model.device, model.dtype)
        requests = [generation.request for generation in generations]
        return largest_batch(model.config, requests, target, capture=capture)

    def _steps(self, generations: Sequence[Generation], n_slots: int, capture: bool) -> StepCache:
        """Memory for the longest request in every slot: that of the last call if it fits."""
        device_type = self.model.device.type
        batch = batch_bucket(n_slots, device_type)
        n_tokens = max(len(g.prompt) + g.max_new_tokens for g in generations)
        if self.kept is not None and self.kept.fits(batch, n_tokens, capture):
            return self.kept
        self.kept = None  # frees its memory before more is allocated
        capacity = cache_capacity(n_tokens, self.model.config.context, device_type)
        steps = StepCache(self.model, batch, capacity, capture=capture)
        if device_type == "cuda":  # elsewhere nothing captured is worth keeping
            self.kept = steps
        return steps

    def _shape(self, generations: Sequence[Generation]) -> StepShape:
        config = self.model.config
        stepped = [g for g in generations if g.max_new_tokens]
        lenses = [g.record.spec for g in stepped if g.record is not None and g.record.reads_steps]
        return StepShape.of(
            LensPlan.of(lenses, config) if lenses else None,
            [generation.request.sampling for generation in generations],
            TableShape.of(g.edits for g in generations if g.edits is not None),
            max(len(generation.stop_ids) for generation in generations),
            config.vocab_size,
        )

"""Decode steps over one cache, captured as CUDA graphs where they run on the kernels.

A step is captured once for each batch bucket and shape (`StepShape`). Vectors, scales, positions,
targets, seeds and stop ids lie in the step's buffers, so changing them captures nothing anew.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..kernels.dispatch import use_triton
from ..kernels.head_stats import MOST_K
from ..model.transformer import Transformer
from .cuda_graph import CaptureFailed, captured
from .limits import batch_bucket, cache_capacity
from .step import DecodeStep, StepShape

WARM_UP_RUNS = 2


class Engine:
    """The cache of a batch and its steps. `model.engine` is the last one used."""

    def __init__(self, model: Transformer, batch: int, capacity: int, *, capture: bool) -> None:
        self.model, self.capture = model, capture
        self.cache = model.new_cache(batch, capacity)
        self.steps: dict[StepShape, EngineStep] = {}

    @classmethod
    def of(cls, model: Transformer, n_requests: int, n_tokens: int, capture: bool) -> Engine:
        """One that holds so many requests of so many tokens: the last one if it does."""
        batch = batch_bucket(n_requests, model.device.type)
        last = model.engine
        if isinstance(last, Engine) and last.fits(model, batch, n_tokens, capture):
            return last
        model.engine = None  # its memory goes before new memory is taken
        capacity = cache_capacity(n_tokens, model.config.context, model.device.type)
        engine = cls(model, batch, capacity, capture=capture)
        if model.device.type == "cuda":  # elsewhere nothing is captured that were worth keeping
            model.engine = engine
        return engine

    def fits(self, model: Transformer, batch: int, n_tokens: int, capture: bool) -> bool:
        keys = self.cache.keys
        return (
            (keys.shape[1], keys.dtype, keys.device) == (batch, model.dtype, model.device)
            and self.cache.capacity >= n_tokens
            and self.capture == capture
        )

    def step(self, shape: StepShape) -> EngineStep:
        """One that does what this shape asks for, made when it is asked for first.

        A step that can edit more will do: with its tables empty it edits nothing.
        """
        for known, step in self.steps.items():
            if known.covers(shape):
                return step
        self.steps[shape] = EngineStep(DecodeStep(self.model, self.cache, shape), self.capture)
        return self.steps[shape]


class EngineStep:
    """A step that is replayed where it could be captured, and run eagerly elsewhere."""

    def __init__(self, step: DecodeStep, capture: bool) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self._capturable = capture and is_capturable(step)

    def prepare(self) -> None:
        """Capture the step, if it can be and was not. What its buffers held is lost.

        A step that can run, but not be captured, stays eager from then on, with one warning.
        """
        if not self._capturable or self.graph is not None:
            return
        try:
            self._capture()
        except CaptureFailed as failed:
            self._capturable = False
            warnings.warn(
                f"the decode step cannot be captured as a CUDA graph ({failed}): it runs eagerly, "
                "which is slower. Turn capture off (capture=False, --eager) to silence this.",
                stacklevel=2,
            )

    def run(self) -> None:
        if self.graph is None:
            self.step.run()
            return
        self.graph.replay()
        self.step.model.parallel.traffic.add_all(self._traffic)

    def _capture(self) -> None:
        """Record one run. Collectives are recorded too, and so are counted at every replay."""
        step, traffic = self.step, self.step.model.parallel.traffic

        def warm_up() -> None:
            for _ in range(WARM_UP_RUNS):  # compiles, and tunes at the cache's full length
                self._as_if_full()
                step.run()
            self._as_if_full()

        def run() -> None:
            before = traffic.copy()
            try:
                step.run()
            finally:  # nothing is sent yet
                self._traffic = traffic.since(before)
                traffic.reset()
                traffic.add_all(before)

        self.graph = captured(step.tokens.device, warm_up, run)

    def _as_if_full(self) -> None:
        """Positions at the cache's end: a captured step serves every length up to it."""
        cache = self.step.cache
        cache.longest = cache.capacity - 1
        cache.lengths.fill_(cache.capacity - 1)
        self.step.active.zero_()


def is_capturable(step: DecodeStep) -> bool:
    """The references of some kernels wait for results on the host."""
    return use_triton(step.tokens) and step.tokens.is_cuda and step.shape.k <= MOST_K


class HostCopy:
    """A device tensor on its way to the host; `wait` gives it once it is there."""

    def __init__(self, source: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not source.is_cuda:
            self._target = source.clone()
            return
        self._target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._target.copy_(source, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._target

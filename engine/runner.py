"""A decode step, captured as a CUDA graph where it runs on the kernels, or run eagerly."""

from __future__ import annotations

import warnings

import torch

from ..kernels.dispatch import use_triton
from ..kernels.head_cut import MOST_K
from .cuda_graph import CaptureFailed, captured
from .step import DecodeStep

WARM_UP_RUNS = 2


class StepRunner:
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
        """Set positions to the cache's end: a captured step serves every length up to it."""
        cache = self.step.cache
        cache.longest = cache.capacity - 1
        cache.lengths.fill_(cache.capacity - 1)
        self.step.active.zero_()


def is_capturable(step: DecodeStep) -> bool:
    """Whether a step runs on kernels: the references of some wait for results on the host."""
    return use_triton(step.tokens) and step.tokens.is_cuda and step.shape.k <= MOST_K

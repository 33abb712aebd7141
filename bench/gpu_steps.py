"""Where the time of a decode step goes, and whether capturing it changes what it says."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..engine.engine import Engine, EngineStep
from ..engine.generation import generate_tokens
from ..engine.lens_spec import LensSpec
from ..engine.plan import plan
from ..engine.sampling import Sampling
from ..interp.lens import LensRecorder
from ..model.transformer import Transformer
from .arm_measures import TOP_K
from .report import bandwidth_shares
from .timing import Rates, synchronize

PROMPT_TOKENS = 64
PROFILED_STEPS = 3
GREEDY = Sampling()


@dataclass(frozen=True)
class Variant:
    """What a step is asked for."""

    lens: LensSpec | None = None
    sampling: Sampling = GREEDY


PLAIN = "no lens"
VARIANTS = {
    PLAIN: Variant(),
    "lens, no targets": Variant(LensSpec(top_k=TOP_K, targets=None, positions="generated")),
    "lens, next targets": Variant(LensSpec(top_k=TOP_K, targets="next", positions="generated")),
    "sampled": Variant(sampling=Sampling(temperature=0.8, top_p=0.95, seed=1)),
}


def new_tokens(model: Transformer, variant: str, n_tokens: int, capture: bool) -> list[int]:
    """What a random prompt is continued with."""
    generator = torch.Generator().manual_seed(1)
    shape = (PROMPT_TOKENS,)
    sequences = [torch.randint(model.config.vocab_size, shape, generator=generator).tolist()]
    asked = VARIANTS[variant]
    recorder = None if asked.lens is None else LensRecorder(model, asked.lens, sequences)
    generate_tokens(
        model,
        sequences,
        max_new_tokens=n_tokens,
        samplings=[asked.sampling],
        observer=recorder,
        capture=capture,
    )
    if recorder is not None:
        recorder.finish()
    return sequences[0][PROMPT_TOKENS:]


def ready_step(model: Transformer, variant: str, context: int, n_steps: int) -> EngineStep:
    """The step of a variant, captured where it can be, with `context` positions in the cache."""
    model.engine = None  # the last variant's step goes first
    engine = Engine.of(model, 1, context + n_steps, capture=True)
    model.engine = engine  # on a CPU, too, so that the step can be had
    new_tokens(model, variant, 2, capture=True)
    (runner,) = engine.steps.values()
    runner.step.active.fill_(True)
    runner.step.n_left.fill_(n_steps)
    engine.cache.lengths.fill_(context)
    engine.cache.longest = context
    return runner


@torch.inference_mode()
def step_times(
    model: Transformer, variant: str, context: int, n_steps: int, rates: Rates
) -> dict[str, Any]:
    """Milliseconds of a step, its shares of bandwidth, and its time by kernel."""
    runner = ready_step(model, variant, context, n_steps + PROFILED_STEPS)
    times_ms = sorted(_times_ms(runner.run, n_steps, model.device))
    p20, _, _, p80 = statistics.quantiles(times_ms, n=5, method="inclusive")
    p50 = statistics.median(times_ms)
    n_taps = len(runner.step.shape.reader.taps) if runner.step.shape.reader is not None else 0
    planned = plan(
        model.config,
        ranks=1,
        context=context + n_steps // 2,
        taps=n_taps,
        top_k=TOP_K,
        dtype=str(model.dtype).removeprefix("torch."),
        device_type="cuda" if model.device.type == "cuda" else "cpu",
    )
    moved_per_s = planned.moved_bytes_per_token / p50 * 1e3
    return {
        "captured": runner.graph is not None,
        "steps": n_steps,
        "context": context,
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        **bandwidth_shares(moved_per_s, rates.copy_bytes_per_s, model.device),
        **_by_kernel(runner.run, model.device),
    }


def _times_ms(run: Callable[[], None], n: int, device: torch.device) -> list[float]:
    """Of each of n runs, one after another, on the device's own clock where it has one."""
    if device.type != "cuda":
        clock = [time.perf_counter()]
        for _ in range(n):
            run()
            clock.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in itertools.pairwise(clock)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    synchronize(device)
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def _by_kernel(run: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Of a step: kernels by name, those that take the most first; on a CPU, operators."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with profile(activities=activities) as profiled:
        for _ in range(PROFILED_STEPS):
            run()
        synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = {}
    for event in profiled.key_averages():
        if event.device_type == wanted:
            spent_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels[event.key] = {
                "ms": spent_us / 1e3 / PROFILED_STEPS,
                "launches": event.count / PROFILED_STEPS,
            }
    by_time = dict(sorted(kernels.items(), key=lambda item: -item[1]["ms"]))
    return {
        "kernels_ms": sum(kernel["ms"] for kernel in kernels.values()),
        "launches": sum(kernel["launches"] for kernel in kernels.values()),
        "kernels": by_time,
    }


def captured_against_eager(model: Transformer, variant: str, n_tokens: int) -> dict[str, Any]:
    """Whether the same prompt is continued alike, and at which new token it first is not."""
    texts = []
    for capture in (True, False):
        model.engine = None
        texts.append(new_tokens(model, variant, n_tokens, capture))
    differing = [at for at, (a, b) in enumerate(zip(*texts, strict=True)) if a != b]
    return {
        "equal": not differing,
        "first_difference": differing[0] if differing else None,
        "tokens": n_tokens,
        "distinct_tokens": len({*texts[0]}),
    }

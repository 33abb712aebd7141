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

from ..engine import LensSpec, Sampling
from ..engine.engine import Engine, StepCache
from ..engine.fit import Target
from ..engine.plan import plan
from ..engine.request import Request
from ..engine.runner import StepRunner
from ..model import Transformer
from .end_to_end_runs import TOP_K
from .report import bandwidth_shares
from .timing import Rates, synchronize

PROMPT_TOKENS = 64
PROFILED_STEPS = 3
GREEDY = Sampling()


@dataclass(frozen=True)
class Variant:
    """A kind of request."""

    lens: LensSpec | None = None
    sampling: Sampling = GREEDY


PLAIN = "no lens"
VARIANTS = {
    PLAIN: Variant(),
    "lens, no targets": Variant(LensSpec(top_k=TOP_K, targets=None, positions="generated")),
    "lens, next targets": Variant(LensSpec(top_k=TOP_K, targets="next", positions="generated")),
    "sampled": Variant(sampling=Sampling(temperature=0.8, top_p=0.95, seed=1)),
}


def request(model: Transformer, variant: str, n_tokens: int) -> Request:
    """A random prompt to continue, as the variant asks."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.vocab_size, (PROMPT_TOKENS,), generator=generator)
    asked = VARIANTS[variant]
    return Request(prompt, n_tokens, asked.sampling, lens=asked.lens, stop_ids=())


@torch.inference_mode()
def ready_step(model: Transformer, variant: str, context: int, n_steps: int) -> StepRunner:
    """The step of a variant, captured where it can be, with `context` positions in the cache."""
    engine = Engine(model)
    engine.kept = steps = StepCache(model, 1, context + n_steps, capture=True)
    engine.run([request(model, variant, 2)])
    (runner,) = steps.steps.values()
    runner.step.active.fill_(True)
    runner.step.n_left.fill_(n_steps)
    steps.cache.lengths.fill_(context)
    steps.cache.longest = context
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
    lens, target = runner.step.shape.lens, Target(model.parallel, model.device, model.dtype)
    planned = plan(
        model.config,
        ranks=1,
        context=context + n_steps // 2,
        taps=0 if lens is None else len(lens.taps),
        top_k=TOP_K,
        dtype=target.dtype_name,
        device_type=target.device_type,
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
    """The times of n runs, one after another, on the device's own clock where it has one."""
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
    """The kernels of a step by name, those that take the most first; on a CPU, operators."""
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
    asked = request(model, variant, n_tokens)
    texts = [Engine(model).run([asked], capture=capture)[0].tokens for capture in (True, False)]
    differing = [step for step, (a, b) in enumerate(zip(*texts, strict=True)) if a != b]
    return {
        "equal": not differing,
        "first_difference": differing[0] if differing else None,
        "tokens": n_tokens,
        "distinct_tokens": len({*texts[0]}),
    }

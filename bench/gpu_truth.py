"""Stage truth: how things are on this card, whatever was expected. Nothing here gates anything.

Tests of kernels and captured steps; where the time of a decode step goes, for what can be asked of
it; the configurations that were chosen; captured against eager tokens; memory and races under
compute-sanitizer. Without a GPU a small model and eager steps: a rehearsal.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..engine import Engine, LensSpec, Request, Sampling, plan
from ..engine.engine import StepCache
from ..engine.fit import Target
from ..engine.runner import StepRunner
from ..kernels.launch import chosen_configs
from ..model import Transformer
from ..model.load import default_device
from ..parallel import TensorParallel
from .end_to_end_runs import TOP_K
from .kernels import SECONDS_FOR_RATES
from .models import default_dtype, model_config, random_model
from .processes import CAPTURED_TESTS, Program, ended, kernel_files, run_tests
from .report import Journal, bandwidth_shares
from .timing import Rates, measured_rates, spread, synchronize

SANITIZER_SHARE = 0.5  # of what is left after the rest, at most, for one of its tools
CUDA_SHAPE, CPU_SHAPE = "llama-3.1-8b", "cpu-small"
CONTEXT = {"cuda": 800, "cpu": 128}  # positions in the cache: the middle of 64 + 1,500
STEPS = {"cuda": 200, "cpu": 10}
COMPARED_TOKENS = {"cuda": 128, "cpu": 8}
TOOLS = ("memcheck", "racecheck")
ERROR_CODE = 9  # of a tool that found something
TAIL_LINES = 12
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


def run(journal: Journal, deadline: float) -> None:
    with journal.step("tests"):
        run_tests(journal, [CAPTURED_TESTS, *kernel_files()], deadline)
    with journal.step("decode steps"):
        measure_steps(journal)
    with journal.step("configurations"):
        journal.record(configurations=chosen_configs())
    with journal.step("compute-sanitizer"):
        sanitize(journal, deadline)


@torch.inference_mode()
def measure_steps(journal: Journal) -> None:
    device = default_device()
    kind = device.type
    dtype = default_dtype(device)
    rates = measured_rates(device, dtype, SECONDS_FOR_RATES)
    config = model_config(CUDA_SHAPE if kind == "cuda" else CPU_SHAPE)
    model = random_model(config, TensorParallel.single(), dtype, device)
    journal.record(copy_gb_per_s=rates.copy_bytes_per_s / 1e9, steps={}, captured_against_eager={})
    for variant in VARIANTS:
        with journal.step(f"step: {variant}"):
            found = step_times(model, variant, CONTEXT[kind], STEPS[kind], rates)
            plain = journal.content["steps"].get(PLAIN, found)
            found["speed_over_no_lens"] = plain["p50_ms"] / found["p50_ms"]
            journal.content["steps"][variant] = found
            _print_step(variant, found)
    for variant in VARIANTS:
        with journal.step(f"captured against eager: {variant}"):
            _compare(journal, model, variant, COMPARED_TOKENS[kind])


def _compare(journal: Journal, model: Transformer, variant: str, n_tokens: int) -> None:
    found = captured_against_eager(model, variant, n_tokens)
    journal.content["captured_against_eager"][variant] = found
    differs = f"differs at new token {found['first_difference']}"
    print(
        f"captured against eager, {variant}: {'equal' if found['equal'] else differs}", flush=True
    )


def _print_step(variant: str, found: dict[str, Any]) -> None:
    nominal = found["nominal_bandwidth_share"]
    of_nominal = "" if nominal is None else f", {nominal:.1%} of nominal bandwidth"
    of_copy = f"{found['copy_bandwidth_share']:.1%} of measured copy bandwidth"
    print(
        f"step, {variant}: {found['p50_ms']:.3f} ms ({found['p20_ms']:.3f} to "
        f"{found['p80_ms']:.3f}), {found['launches']:.0f} launches "
        f"of {found['kernels_ms']:.3f} ms\n    {of_copy}{of_nominal}",
        flush=True,
    )


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
    times_ms = spread(_times_ms(runner.run, n_steps, model.device))
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
    moved_per_s = planned.moved_bytes_per_token / times_ms["p50"] * 1e3
    return {
        "captured": runner.graph is not None,
        "steps": n_steps,
        "context": context,
        **{f"{name}_ms": times_ms[name] for name in ("p20", "p50", "p80")},
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


def sanitize(journal: Journal, deadline: float) -> None:
    """The program alone first: it may fail by itself, and what it compiles is kept on disk."""
    found: dict[str, Any] = journal.content.setdefault("compute_sanitizer", {})
    program = [sys.executable, "-m", f"{__package__}.kernels"]
    found["program alone"] = _run_logged(program, _share_of(deadline))
    print(f"program for compute-sanitizer: {found['program alone']['ended']}", flush=True)
    tool = sanitizer()
    for name in TOOLS:
        journal.now(f"compute-sanitizer: {name}")
        if tool is None:
            found[name] = {"ended": "not installed"}
        else:
            words = [tool, "--tool", name, "--error-exitcode", str(ERROR_CODE), *program]
            found[name] = _run_logged(words, _share_of(deadline))
            if found[name]["ended"] == ended(ERROR_CODE):
                journal.add_red(f"compute-sanitizer {name}", *found[name]["last_lines"][-1:])
        journal.write()
        print(f"compute-sanitizer {name}: {found[name]['ended']}", flush=True)


def sanitizer() -> str | None:
    """Its path, from PATH or the CUDA toolkit's folder."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(name, path=str(toolkit))


def _share_of(deadline: float) -> float:
    now = time.monotonic()
    return now + SANITIZER_SHARE * (deadline - now)


def _run_logged(command: list[str], deadline: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        program = Program(command, Path(folder) / "log")
        code = program.wait(deadline)
        return {"ended": ended(code), "last_lines": program.lines()[-TAIL_LINES:]}

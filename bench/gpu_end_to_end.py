"""Stage end-to-end: generation with every layer read, against what else there is, at true shapes.

bf16, 64 + 1,500 tokens, random weights made on the device. First the tests of captured steps: red
ones drop our own runs, which are captured, and leave the rivals. Then our runs at every shape that
fits the card, in the order given; then, for as long as time is left, the rivals, at the shapes in
an order of their own. The file has each run as soon as it was made. A run with a red check is not
measured.

On a CPU, which decides nothing, a small shape: a rehearsal.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine import check_fits, device_memory_bytes
from ..model import Transformer
from ..model.load import default_device
from ..parallel import TensorParallel
from .end_to_end import (
    CHECKED_TOKENS,
    SECONDS_FOR_RATES,
    described,
    figures_of,
    make_model,
    peak_above_weights,
    planned_run,
    print_result,
    verdicts,
)
from .end_to_end_runs import (
    ORACLE,
    OURS,
    PAPER,
    TOP_K,
    UNCACHED,
    Run,
    Setup,
    measure_times,
    our_runs,
    problems,
    rival_runs,
    timed,
    warm,
    without_what_does_not_fit,
)
from .models import CPU_SHAPES, N_LAYERS, default_dtype, model_config
from .processes import CAPTURED_STEPS, CAPTURED_TESTS, run_tests
from .report import Journal, first_line
from .timing import Rates, measured_rates

SHAPES = {"cuda": ("llama-3.1-8b", "qwen3-4b", "qwen3-14b"), "cpu": ("cpu-small",)}
RIVAL_SHAPES = (*N_LAYERS, *CPU_SHAPES)  # whose rivals come first
TOKENS = {"cuda": (64, 1500), "cpu": (8, 4)}  # prompt and new ones
ROUNDS = 2
# Of a shape, beside the timed runs: making it, checks, compiling and capturing.
OVERHEAD_SECONDS = {"cuda": 20.0, "cpu": 1.0}
EXPECTED_COPY_SHARE = 0.6  # that our runs reach at least


def run(journal: Journal, deadline: float, truth: Path | None, shapes: Sequence[str]) -> None:
    """truth: the file of a stage that ran the tests on this very code, if there is one."""
    device = default_device()
    shapes = shapes or SHAPES[device.type]
    with journal.step("tests of captured steps"):
        run_tests(journal, [CAPTURED_TESTS], deadline, truth)
    with journal.step("rates"):
        rates = measured_rates(device, default_dtype(device), SECONDS_FOR_RATES)
        measure(journal, deadline, shapes, device, rates)


def measure(
    journal: Journal,
    deadline: float,
    shapes: Sequence[str],
    device: torch.device,
    rates: Rates,
) -> None:
    journal.record(decides=device.type == "cuda", shapes={}, skipped={})
    fitting = [
        Shape(journal, deadline, setup_of(name, device), rates)
        for name in shapes
        if fits(journal, setup_of(name, device))
    ]
    for shape in fitting:
        with journal.step(f"{shape.name}: our runs"):
            shape.measure_ours()
        _free(device)
    for shape in sorted(fitting, key=lambda shape: RIVAL_SHAPES.index(shape.name)):
        with journal.step(f"{shape.name}: rivals"):
            shape.measure_rivals()
        _free(device)
    for shape in fitting:
        print(f"\n{shape.name}")
        print_result(shape.result)


def setup_of(shape: str, device: torch.device) -> Setup:
    return Setup(shape, default_dtype(device), device, *TOKENS[device.type], rounds=ROUNDS)


def fits(journal: Journal, setup: Setup) -> bool:
    planned = planned_run(setup, model_config(setup.shape), TensorParallel.single())
    try:
        check_fits(planned, device_memory_bytes(setup.device), setup.shape)
    except ValueError as error:
        _skip(journal, setup.shape, str(error))
        return False
    return True


def _skip(journal: Journal, what: str, why: str) -> None:
    print(f"skipped: {what}: {why}", flush=True)
    journal.content["skipped"][what] = why
    journal.write()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # no captured step is left that would use one
        torch.cuda.empty_cache()


class Shape:
    """One model's figures so far. The model itself is made for each of two visits."""

    def __init__(self, journal: Journal, deadline: float, setup: Setup, rates: Rates) -> None:
        self.name, self._setup = setup.shape, setup
        self._journal, self._deadline = journal, deadline
        config = model_config(setup.shape)
        self._vocab_size = config.vocab_size
        self.result = described(setup, config, TensorParallel.single(), rates)
        journal.content["shapes"][setup.shape] = self.result

    @torch.inference_mode()
    def measure_ours(self) -> None:
        """By turns, each held against transformers before."""
        red = self._journal.content["red"].get(CAPTURED_STEPS)
        if red:
            self._leave_out(OURS, f"tests of captured steps are red: {', '.join(red)}")
            return
        if self._our_seconds() > self._left_seconds():
            self._leave_out(OURS, f"out of time: about {self._our_seconds():.0f} s for them")
            return
        model = self._made()
        runs = {ORACLE: rival_runs(model)[ORACLE], **our_runs(model)}
        self._now("checks of our runs")
        ours = self._green(model, runs, OURS)
        warm(ours, self._setup, self._vocab_size)
        self._time(model, ours, self._setup)

    @torch.inference_mode()
    def measure_rivals(self) -> None:
        """One after another, as time allows, each held against transformers before."""
        model = self._made()
        runs, left_out = without_what_does_not_fit(rival_runs(model), self._setup, self._vocab_size)
        self.result["left_out"] |= left_out
        self._now("checks of rivals")
        green = self._green(model, runs, tuple(runs))
        # the claims are about the paper's method and its baseline
        for name in sorted(green, key=lambda name: (name != PAPER, name not in UNCACHED, name)):
            with self._journal.step(f"{self.name}: {name}"):
                try:
                    self._time_rival(model, name, green[name])
                except (ValueError, torch.OutOfMemoryError) as error:
                    self._leave_out([name], first_line(error))
                    _free(self._setup.device)

    def _time_rival(self, model: Transformer, name: str, run: Run) -> None:
        expected = self._expected_seconds(name, run)
        if expected > self._left_seconds():
            self._leave_out([name], f"out of time: about {expected:.0f} s for it")
            return
        self._time(model, {name: run}, dataclasses.replace(self._setup, rounds=1))

    def _expected_seconds(self, name: str, run: Run) -> float:
        """How long it takes to time it, from a short run."""
        setup = self._setup
        if name in UNCACHED:
            text = setup.text(self._vocab_size, setup.sampled_lengths[-1])
            return len(setup.sampled_lengths) * timed(run, text, 1, setup.device).seconds
        prompt = setup.prompt(self._vocab_size)
        short = timed(run, prompt, CHECKED_TOKENS, setup.device).seconds
        return short * setup.new_tokens / CHECKED_TOKENS

    def _made(self) -> Transformer:
        # buffers that the measuring of rates keeps are no run's memory
        on_cuda = self._setup.device.type == "cuda"
        self._beside = torch.cuda.memory_allocated(self._setup.device) if on_cuda else 0
        return make_model(self._setup, TensorParallel.single())

    def _our_seconds(self) -> float:
        setup, copy_bytes_per_s = self._setup, 1e9 * self.result["copy_gb_per_s"]
        seconds_per_token = self.result["moved_bytes_per_token"] / (
            EXPECTED_COPY_SHARE * copy_bytes_per_s
        )
        tokens = len(OURS) * setup.rounds * setup.new_tokens
        return OVERHEAD_SECONDS[setup.device.type] + tokens * seconds_per_token

    def _left_seconds(self) -> float:
        return self._deadline - time.monotonic()

    def _green(
        self, model: Transformer, runs: dict[str, Run], wanted: Sequence[str]
    ) -> dict[str, Run]:
        """The wanted runs whose answers are right."""
        prompt = self._setup.prompt(self._vocab_size)
        red = problems(model, runs, prompt, CHECKED_TOKENS, TOP_K)
        for name, found in red.items():
            self._journal.add_red(f"{self.name}: {name}", *found)
            self._leave_out([name], f"its check is red: {'; '.join(found)}")
        return {name: runs[name] for name in wanted if name not in red}

    def _time(self, model: Transformer, runs: dict[str, Run], setup: Setup) -> None:
        def keep(name: str, times: dict[str, Any]) -> None:
            peak = peak_above_weights(model, name, runs[name], setup, times) - self._beside
            self.result["runs"][name] = figures_of(times, peak, 0, self.result, setup)
            self.result["claims"] = verdicts(self.result)
            self._journal.write()
            print(f"{self.name}: {name}: {times['tokens_per_s']:.3f} tokens/s", flush=True)

        if runs:
            measure_times(runs, setup, self._vocab_size, keep)

    def _leave_out(self, names: Sequence[str], why: str) -> None:
        for name in names:
            print(f"left out: {self.name}: {name}: {why}", flush=True)
            self.result["left_out"][name] = why
        self._journal.write()

    def _now(self, what: str) -> None:
        self._journal.now(f"{self.name}: {what}")

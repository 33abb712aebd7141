"""Stage truth: how things are on this card, whatever was expected. Nothing here gates anything.

Tests of kernels and captured steps; where the time of a decode step goes, for what can be asked of
it; the configurations that were chosen; captured against eager tokens; memory and races under
compute-sanitizer. Without a GPU a small model and eager steps: a rehearsal.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..kernels.launch import chosen_configs
from ..model.load import default_device
from ..model.transformer import Transformer
from ..parallel.group import TensorParallel
from . import gpu_suite
from .gpu_steps import PLAIN, VARIANTS, captured_against_eager, step_times
from .kernels import SECONDS_FOR_RATES
from .processes import Group, ended
from .report import Journal
from .shapes import default_dtype, model_config, random_model
from .timing import measured_rates

TEST_SHARE = 0.4  # of the time, at most, for the tests
SANITIZER_SHARE = 0.5  # of what is left after the rest, at most, for one of its tools
CUDA_SHAPE, CPU_SHAPE = "llama-3.1-8b", "cpu-small"
CONTEXT = {"cuda": 800, "cpu": 128}  # positions in the cache: the middle of 64 + 1,500
STEPS = {"cuda": 200, "cpu": 10}
COMPARED_TOKENS = {"cuda": 128, "cpu": 8}
TOOLS = ("memcheck", "racecheck")
ERROR_CODE = 9  # of a tool that found something
TAIL_LINES = 12


def run(journal: Journal, deadline: float) -> None:
    with journal.step("tests"):
        run_tests(journal, time.monotonic() + TEST_SHARE * (deadline - time.monotonic()))
    with journal.step("decode steps"):
        measure_steps(journal)
    with journal.step("configurations"):
        journal.record(configurations=chosen_configs())
    with journal.step("compute-sanitizer"):
        sanitize(journal, deadline)


def run_tests(journal: Journal, deadline: float) -> None:
    found: dict[str, Any] = journal.content.setdefault("tests", {})

    def on_file(name: str, result: gpu_suite.FileResult) -> None:
        gpu_suite.print_result(name, result)
        found[name] = result
        journal.write()

    with gpu_suite.TestRun([gpu_suite.CAPTURED_TESTS, *gpu_suite.kernel_files()]) as tests:
        tests.wait(deadline, on_file)
    for what, failed in gpu_suite.red_of(found).items():
        journal.add_red(what, *failed)


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


def sanitize(journal: Journal, deadline: float) -> None:
    """The program alone first: it may fail by itself, and what it compiles is kept on disk."""
    found: dict[str, Any] = journal.content.setdefault("compute_sanitizer", {})
    program = [sys.executable, "-m", f"{__package__}.ops"]
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
        group = Group(command, Path(folder) / "log")
        code = group.wait(deadline)
        return {"ended": ended(code), "last_lines": group.lines()[-TAIL_LINES:]}

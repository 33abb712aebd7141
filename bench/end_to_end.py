"""Generation with every layer read, against what else there is: seven ways.

    shardlens bench end-to-end [--shape cpu] [--save NAME]

(1) the paper's single-GPU baseline, reimplemented faithfully, in float32; (2) the same in the
model's half dtype; (3) transformers with its cache, the last position's states of all layers
through the head at each step; (4) the paper's method: cached generation, captured states, one
batched decode with full logits at the end, and once more with a decode per layer, as its released
code has it, which needs less memory; (5) shardlens without lens; (6) with a live lens on
every layer; (7) with lens and steering. All on the same weights and prompt, greedy, batch 1.

First the answers: 1, 4 and 6 must have the same top-1 token as 3 in every layer and position,
and 7 that of transformers under hooks. A red check ends the benchmark. Then time, all by
turns; a baseline without cache, whose tokens take longer the longer the text, is timed for single
tokens at three lengths and added up between them, which the result calls extrapolated. Memory is
the peak above the weights, of each run in a process of its own on a CPU.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ..engine import Plan, plan
from ..engine.fit import Target
from ..model import ModelConfig, Transformer
from ..parallel import TensorParallel
from .end_to_end_runs import (
    LENS,
    OURS,
    PAPER,
    PLAIN,
    STEERED,
    TOP_K,
    UNCACHED,
    Run,
    Setup,
    all_runs,
    measure_times,
    peak_bytes,
    problems,
    warm,
    without_what_does_not_fit,
)
from .models import model_config, random_model
from .report import bandwidth_shares, environment, figure_or_none, print_verdicts, verdict
from .timing import Rates, measured_rates

CHECKED_TOKENS = 8
# glibc raises its threshold with the sizes it sees; then what is freed stays resident, by chance
FIXED_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
SECONDS_FOR_RATES = 2.0
# What must be reached on a CPU and on a GPU: (claim, ours, other, on CPU, on GPU)
SPEEDS = (
    ("speed with lens over without", LENS, PLAIN, 0.85, 0.97),
    ("speed with lens and steering over without", STEERED, PLAIN, None, 0.96),
    ("speed with lens over the paper's method", LENS, PAPER, 1.2, 5.0),
    ("speed with lens over the baseline", LENS, "baseline", 41.0, 100.0),
)
MEMORIES = (
    ("memory with lens over the paper's method", LENS, PAPER, 1 / 7),
    ("memory with lens over the baseline", LENS, "baseline", 1 / 40),
)
CLAIMED_CPU_SHAPE = "cpu"
# Without lens, on a GPU: of the bandwidth that a copy was measured to reach on this machine, reads
# and writes counted, which is some tenth less than the data sheet's.
LEAST_COPY_BANDWIDTH_SHARE = 0.75


@torch.inference_mode()
def run(setup: Setup, parallel: TensorParallel) -> dict[str, Any]:
    """The whole benchmark. Raises ValueError naming what a check found wrong."""
    model = make_model(setup, parallel)
    vocab_size = model.config.vocab_size
    runs, left_out = without_what_does_not_fit(all_runs(model), setup, vocab_size)
    red = problems(model, runs, setup.prompt(vocab_size), CHECKED_TOKENS, TOP_K)
    if red:
        found = "; ".join(f"{name}: {text}" for name, texts in red.items() for text in texts)
        raise ValueError(f"a check is red, nothing is measured: {found}")
    print("checks: green", flush=True)
    # anew: what the checks have left in memory goes
    runs = {name: run for name, run in all_runs(model).items() if name in runs}
    times = measure_times_on(model, runs, setup)
    peaks = measure_peaks(model, runs, setup, times)
    rates = measured_rates(setup.device, setup.dtype, SECONDS_FOR_RATES)
    result = described(setup, model.config, parallel, rates)
    for name, each in runs.items():
        sent = _sent_bytes(model, each, setup) if parallel.size > 1 else 0
        result["runs"][name] = figures_of(times[name], peaks[name], sent, result, setup)
    return result | {"left_out": left_out, "claims": verdicts(result)}


def make_model(setup: Setup, parallel: TensorParallel) -> Transformer:
    return random_model(model_config(setup.shape), parallel, setup.dtype, setup.device)


def measure_times_on(
    model: Transformer, runs: dict[str, Run], setup: Setup
) -> dict[str, dict[str, Any]]:
    """By turns; where memory is counted along, the others first, before our cache is there."""
    vocab_size = model.config.vocab_size
    if setup.device.type != "cuda":
        warm(runs, setup, vocab_size)
        return measure_times(runs, setup, vocab_size)
    found: dict[str, dict[str, Any]] = {}
    for are_ours, rounds in ((False, 1), (True, setup.rounds)):
        part = {name: run for name, run in runs.items() if (name in OURS) == are_ours}
        warm(part, setup, vocab_size)
        found |= measure_times(part, dataclasses.replace(setup, rounds=rounds), vocab_size)
    return {name: found[name] for name in runs}


def measure_peaks(
    model: Transformer, runs: dict[str, Run], setup: Setup, times: dict[str, dict[str, Any]]
) -> dict[str, int]:
    """Bytes above the weights."""
    peaks = {}
    for name, run in runs.items():
        if setup.device.type == "cuda" or model.parallel.size > 1:
            peaks[name] = peak_above_weights(model, name, run, setup, times[name])
        else:
            spawning = ProcessPoolExecutor(1, get_context("spawn"))
            with patch.dict(os.environ, FIXED_ALLOCATOR), spawning as pool:
                threads = torch.get_num_threads()
                peaks[name] = pool.submit(_peak_in_this_process, name, setup, threads).result()
        print(f"{name:26}{peaks[name] / 2**20:12,.1f} MiB above the weights", flush=True)
    return peaks


def _peak_in_this_process(name: str, setup: Setup, threads: int) -> int:
    torch.set_num_threads(threads)
    model = make_model(setup, TensorParallel.single())
    with torch.inference_mode():
        return peak_bytes(all_runs(model)[name], name, setup, model.config.vocab_size)


def peak_above_weights(
    model: Transformer, name: str, run: Run, setup: Setup, times: dict[str, Any]
) -> int:
    """As the device counted it while the run was timed; on a CPU, of one more run here."""
    if setup.device.type != "cuda":
        return peak_bytes(run, name, setup, model.config.vocab_size)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return int(times["allocated_bytes"]) - weights


def planned_run(setup: Setup, config: ModelConfig, parallel: TensorParallel) -> Plan:
    """The memory and traffic of a run with every layer read."""
    target = Target(parallel, setup.device, setup.dtype)
    return plan(
        config,
        ranks=parallel.size,
        context=setup.n_tokens,
        taps=config.n_layers,
        top_k=TOP_K,
        dtype=target.dtype_name,
        device_type=target.device_type,
    )


def described(
    setup: Setup, config: ModelConfig, parallel: TensorParallel, rates: Rates
) -> dict[str, Any]:
    """A result whose figures are still to be measured."""
    planned = planned_run(setup, config, parallel)
    return {
        "benchmark": "end_to_end",
        "environment": environment(),
        "shape": setup.shape,
        "model": {
            name: value
            for name, value in vars(config).items()
            if isinstance(value, int | float | str)
        },
        "device": setup.device.type,
        "dtype": planned.workload.dtype,
        "ranks": parallel.size,
        "prompt_tokens": setup.prompt_tokens,
        "new_tokens": setup.new_tokens,
        "rounds": setup.rounds,
        "copy_gb_per_s": rates.copy_bytes_per_s / 1e9,
        "moved_bytes_per_token": planned.moved_bytes_per_token,
        "planned_above_weights_bytes": planned.total_bytes - planned.weights_bytes,
        "runs": {},
        "left_out": {},
        "claims": [],
    }


def figures_of(
    times: dict[str, Any], peak: int, sent_bytes: float, result: dict[str, Any], setup: Setup
) -> dict[str, Any]:
    """A run's figures. The shares are of moving what a step of ours moves, lens included."""
    moved_per_s = times["tokens_per_s"] * result["moved_bytes_per_token"]
    return {
        **times,
        "peak_bytes": peak,
        **bandwidth_shares(moved_per_s, 1e9 * result["copy_gb_per_s"], setup.device),
        "sent_bytes_per_token": sent_bytes,
    }


def _sent_bytes(model: Transformer, run: Run, setup: Setup) -> float:
    """Bytes that this rank sends per new token, prefill included."""
    model.parallel.traffic.reset()
    run(setup.prompt(model.config.vocab_size), setup.new_tokens, TOP_K, None)
    return model.parallel.traffic.total_bytes / setup.new_tokens


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim of which both sides were measured, its figure, and whether it is met."""
    runs = dict(result["runs"])
    for name in UNCACHED:
        if name in runs:
            runs.setdefault("baseline", runs[name])
    on_gpu = result["device"] != "cpu"
    is_claimed = on_gpu or result["shape"] == CLAIMED_CPU_SHAPE
    found = []
    for text, ours, other, on_cpu_target, on_gpu_target in SPEEDS:
        if ours in runs and other in runs:
            figure = runs[ours]["tokens_per_s"] / runs[other]["tokens_per_s"]
            target = on_gpu_target if on_gpu else on_cpu_target
            found.append(verdict(text, figure, target if is_claimed else None))
    for text, ours, other, target in MEMORIES:
        if ours in runs and other in runs and runs[other]["peak_bytes"]:
            figure = runs[ours]["peak_bytes"] / runs[other]["peak_bytes"]
            found.append(verdict(text, figure, target if is_claimed else None, below=True))
    shares = ("measured copy", "copy_bandwidth_share"), ("nominal", "nominal_bandwidth_share")
    for kind, name in shares:
        share = runs[PLAIN][name] if PLAIN in runs else None
        if share is not None:
            is_target = on_gpu and kind == "measured copy"
            target = LEAST_COPY_BANDWIDTH_SHARE if is_target else None
            found.append(verdict(f"share of {kind} bandwidth without lens", share, target))
    return found


def print_result(result: dict[str, Any]) -> None:
    print(f"{'':26}{'':33}{'of measured':>16}{'of nominal':>13}")
    headings = ("tokens/s", "first, ms", "MiB")
    print(
        f"{'run':26}"
        + "".join(f"{heading:>11}" for heading in headings)
        + f"{'copy bandwidth':>16}{'bandwidth':>13}{'sent/token':>11}"
    )
    for name, figures in result["runs"].items():
        print(f"{name:26}{_line(figures)}")
    if any(figures["extrapolated"] for figures in result["runs"].values()):
        print("* extrapolated from single tokens at three lengths")
    for name, why in result["left_out"].items():
        print(f"left out: {name}: {why}")
    print_verdicts(result["claims"])


def _line(figures: dict[str, Any]) -> str:
    mark = "*" if figures["extrapolated"] else " "
    nominal = figures["nominal_bandwidth_share"]
    of_nominal = "-" if nominal is None else f"{nominal:.1%}"
    return (
        f"{figures['tokens_per_s']:>10.3f}{mark}{figures['first_token_ms']:>11,.1f}"
        f"{figures['peak_bytes'] / 2**20:>11,.1f}{figures['copy_bandwidth_share']:>16.1%}"
        f"{of_nominal:>13}{figures['sent_bytes_per_token']:>11,.0f}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """A PNG of speed and memory by run."""
    names = list(result["runs"])
    figure = figure_or_none(9, 0.5 * len(names) + 1.4)
    if figure is None:
        return
    speed, memory = figure.subplots(1, 2, sharey=True)
    found = result["runs"].values()
    panels = (
        (speed, "tokens/s", [figures["tokens_per_s"] for figures in found]),
        (memory, "MiB above weights", [figures["peak_bytes"] / 2**20 for figures in found]),
    )
    for axis, label, values in panels:
        colours = ["black" if "shardlens" in name else "grey" for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [f"{value:,.3g}" for value in values], padding=3, fontsize="small")
        axis.set(xscale="log", xlabel=label)
        axis.margins(x=0.25)
    speed.invert_yaxis()
    figure.suptitle(
        f"{result['shape']}, {result['dtype']}, {result['prompt_tokens']} + "
        f"{result['new_tokens']} tokens, {result['environment']['hardware']}",
        fontsize="small",
    )
    figure.savefig(path, dpi=100)

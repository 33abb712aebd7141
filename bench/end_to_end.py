"""Generation with every layer read, against what else there is: the seven arms.

    shardlens bench end-to-end [--shape cpu] [--save NAME]

(1) the paper's single-GPU baseline, reimplemented faithfully, in float32; (2) the same in the
model's half dtype; (3) transformers with its cache, the last position's states of all layers
through the head at each step; (4) the paper's method: cached generation, captured states, one
batched decode with full logits at the end, and once more with a decode a layer, as its released
code has it, which needs less memory; (5) shardlens without lens; (6) with a live lens on
every layer; (7) with lens and steering. All on the same weights and prompt, greedy, batch 1.

First the answers: arms 1, 4 and 6 must tell the same top-1 token as 3 in every layer and position,
and 7 what transformers tells under hooks. A red check ends the benchmark. Then time, all arms by
turns; a baseline without cache, whose tokens take longer the longer the text, is timed for single
tokens at three lengths and added up between them, which the result calls extrapolated. Memory is
the peak above the weights, of each arm in a process of its own on a CPU.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch

from ..engine.engine import Engine
from ..engine.plan import Plan, plan
from ..model.config import ModelConfig
from ..model.transformer import Transformer
from ..parallel.group import TensorParallel
from .arm_measures import (
    LENS,
    ORACLE,
    OWN,
    PAPER,
    PAPER_BY_LAYER,
    PLAIN,
    STEERED,
    TOP_K,
    UNCACHED,
    Run,
    Setup,
    measure_times,
    peak_bytes,
)
from .baselines import CachedLensArm, FaithfulBaseline, PaperMethod
from .end_to_end_checks import problems
from .end_to_end_report import verdicts
from .models import model_config, random_model
from .own_arms import OwnArm, random_steering
from .report import bandwidth_shares, environment
from .shared_weights import as_transformers
from .timing import Rates, measured_rates

CHECKED_TOKENS, WARM_TOKENS = 8, 3
# glibc raises its threshold with the sizes it sees; then what is freed stays resident, by chance
FIXED_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
SECONDS_FOR_RATES = 2.0
OTHER_DTYPE = "the weights are held in the other dtype"


def all_runs(model: Transformer) -> dict[str, Run]:
    """On several ranks only our own: the others run on one."""
    own = shardlens_runs(model)
    return own if model.parallel.size > 1 else {**rival_runs(model), **own}


def shardlens_runs(model: Transformer) -> dict[str, Run]:
    steering = random_steering(model)
    return {
        PLAIN: OwnArm(model).run,
        LENS: OwnArm(model, lens=True).run,
        STEERED: OwnArm(model, lens=True, steering=steering).run,
    }


def rival_runs(model: Transformer) -> dict[str, Run]:
    hf = as_transformers(model)
    return {
        baseline_name(model.dtype): FaithfulBaseline(hf).run,
        ORACLE: CachedLensArm(hf).run,
        PAPER: PaperMethod(hf).run,
        PAPER_BY_LAYER: PaperMethod(hf, by_layer=True).run,
    }


def baseline_name(dtype: torch.dtype) -> str:
    return UNCACHED[0] if dtype == torch.float32 else UNCACHED[1]


def without_what_does_not_fit(
    arms: dict[str, Run], setup: Setup, vocab_size: int
) -> tuple[dict[str, Run], dict[str, str]]:
    """(arms, why the others are left out): rivals hold logits that a card may have no room for."""
    left_out = {name: OTHER_DTYPE for name in UNCACHED if name not in arms}
    for name in (name for name in arms if name in UNCACHED):
        try:
            arms[name](setup.text(vocab_size, setup.sampled_lengths[-1]), 1, TOP_K, None)
        except (ValueError, torch.OutOfMemoryError) as error:
            left_out[name] = str(error).splitlines()[0]
            if setup.device.type == "cuda":
                torch.cuda.empty_cache()
    return {name: run for name, run in arms.items() if name not in left_out}, left_out


def _peak_in_this_process(name: str, setup: Setup, threads: int) -> int:
    torch.set_num_threads(threads)
    model = make_model(setup, TensorParallel.single())
    with torch.inference_mode():
        return peak_bytes(all_runs(model)[name], name, setup, model.config.vocab_size)


def measure_times_on(
    model: Transformer, arms: dict[str, Run], setup: Setup
) -> dict[str, dict[str, Any]]:
    """By turns; where memory is counted along, the others first, before our cache is there."""
    vocab_size = model.config.vocab_size
    if setup.device.type != "cuda":
        warm(arms, setup, vocab_size)
        return measure_times(arms, setup, vocab_size)
    model.engine = None
    found: dict[str, dict[str, Any]] = {}
    others = {name: run for name, run in arms.items() if name not in OWN}
    ours = {name: run for name, run in arms.items() if name in OWN}
    if others:
        warm(others, setup, vocab_size)
        found = measure_times(others, dataclasses.replace(setup, rounds=1), vocab_size)
    capture_for(model, setup)
    warm(ours, setup, vocab_size)
    found |= measure_times(ours, setup, vocab_size)
    return {name: found[name] for name in arms}


def capture_for(model: Transformer, setup: Setup) -> None:
    """Make the cache as long as the timed runs need it: what is captured earlier serves them."""
    Engine.of(model, 1, setup.prompt_tokens + setup.new_tokens, capture=True)


def warm(arms: dict[str, Run], setup: Setup, vocab_size: int) -> None:
    """Whatever is set up once."""
    for name, run in arms.items():
        if name not in UNCACHED:
            run(setup.prompt(vocab_size), WARM_TOKENS, TOP_K, None)


def measure_peaks(
    model: Transformer, arms: dict[str, Run], setup: Setup, times: dict[str, dict[str, Any]]
) -> dict[str, int]:
    """Bytes above the weights."""
    peaks = {}
    for name, run in arms.items():
        if setup.device.type == "cuda" or model.parallel.size > 1:
            peaks[name] = peak_above_weights(model, name, run, setup, times[name])
        else:
            spawning = ProcessPoolExecutor(1, get_context("spawn"))
            with patch.dict(os.environ, FIXED_ALLOCATOR), spawning as pool:
                threads = torch.get_num_threads()
                peaks[name] = pool.submit(_peak_in_this_process, name, setup, threads).result()
        print(f"{name:26}{peaks[name] / 2**20:12,.1f} MiB above the weights", flush=True)
    return peaks


def peak_above_weights(
    model: Transformer, name: str, run: Run, setup: Setup, times: dict[str, Any]
) -> int:
    """As the device counted it while the arm was timed; on a CPU, of one more run here."""
    if setup.device.type != "cuda":
        return peak_bytes(run, name, setup, model.config.vocab_size)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return int(times["allocated_bytes"]) - weights


def make_model(setup: Setup, parallel: TensorParallel) -> Transformer:
    return random_model(model_config(setup.shape), parallel, setup.dtype, setup.device)


@torch.inference_mode()
def run(setup: Setup, parallel: TensorParallel) -> dict[str, Any]:
    """The whole benchmark. Raises ValueError naming what a check found wrong."""
    model = make_model(setup, parallel)
    vocab_size = model.config.vocab_size
    arms, left_out = without_what_does_not_fit(all_runs(model), setup, vocab_size)
    red = problems(model, arms, setup.prompt(vocab_size), CHECKED_TOKENS, TOP_K)
    if red:
        found = "; ".join(f"{name}: {text}" for name, texts in red.items() for text in texts)
        raise ValueError(f"a check is red, nothing is measured: {found}")
    print("checks: green", flush=True)
    times = measure_times_on(model, arms, setup)
    peaks = measure_peaks(model, arms, setup, times)
    rates = measured_rates(setup.device, setup.dtype, SECONDS_FOR_RATES)
    result = described(setup, model.config, parallel, rates)
    for name, run in arms.items():
        sent = _sent_bytes(model, run, setup) if parallel.size > 1 else 0
        result["arms"][name] = figures_of(times[name], peaks[name], sent, result, setup)
    return result | {"left_out": left_out, "claims": verdicts(result)}


def planned_run(setup: Setup, config: ModelConfig, ranks: int) -> Plan:
    """What a run with every layer read takes and moves."""
    return plan(
        config,
        ranks=ranks,
        context=setup.prompt_tokens + setup.new_tokens,
        taps=config.n_layers,
        top_k=TOP_K,
        dtype=str(setup.dtype).removeprefix("torch."),
        device_type="cuda" if setup.device.type == "cuda" else "cpu",
    )


def described(
    setup: Setup, config: ModelConfig, parallel: TensorParallel, rates: Rates
) -> dict[str, Any]:
    """A result whose arms are still to be measured."""
    planned = planned_run(setup, config, parallel.size)
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
        "arms": {},
        "left_out": {},
        "claims": [],
    }


def figures_of(
    times: dict[str, Any], peak: int, sent_bytes: float, result: dict[str, Any], setup: Setup
) -> dict[str, Any]:
    """Figures of an arm. The shares are of moving what a step of ours moves, lens included."""
    moved_per_s = times["tokens_per_s"] * result["moved_bytes_per_token"]
    return {
        **times,
        "peak_bytes": peak,
        **bandwidth_shares(moved_per_s, 1e9 * result["copy_gb_per_s"], setup.device),
        "sent_bytes_per_token": sent_bytes,
    }


def _sent_bytes(model: Transformer, run: Run, setup: Setup) -> float:
    """Bytes this rank sends a new token, prefill included."""
    model.parallel.traffic.reset()
    run(setup.prompt(model.config.vocab_size), setup.new_tokens, TOP_K, None)
    return model.parallel.traffic.total_bytes / setup.new_tokens

"""Generation with every layer read, against what else there is: the seven arms.

    shardlens bench end-to-end [--shape cpu] [--save NAME]

(1) the paper's single-GPU baseline, reimplemented faithfully, in float32; (2) the same in the
model's half dtype; (3) transformers with its cache, the last position's states of all layers
through the head at each step; (4) the paper's method: cached generation, captured states, one
batched decode with full logits at the end, and once more with a decode a layer, as its released
code has it, which needs less memory; (5) shardlens without lens; (6) with a live lens on
every layer; (7) with lens and steering. All on the same weights and prompt, greedy, batch 1.

First the answers: arms 1, 3, 4 and 6 must tell the same top-1 token in every layer and position,
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

from ..model.plan import plan
from ..model.transformer import Transformer
from ..parallel.group import TensorParallel
from .arm_measures import TOP_K, UNCACHED, Run, Setup, measure_times, peak_bytes
from .baselines import CachedLensArm, FaithfulBaseline, PaperMethod
from .end_to_end_checks import problems
from .end_to_end_report import verdicts
from .models import model_config, random_model
from .own_arms import OwnArm, random_steering
from .report import environment
from .shared_weights import as_transformers
from .timing import measured_rates

CHECKED_TOKENS = 8
# glibc raises its threshold with the sizes it sees; then what is freed stays resident, by chance
FIXED_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
OTHER_DTYPE = "the weights are held in the other dtype"


def arms_of(model: Transformer, setup: Setup) -> dict[str, Run]:
    """On several ranks only our own: the others run on one."""
    steering = random_steering(model)
    own = {
        "5 shardlens": OwnArm(model).run,
        "6 shardlens lens": OwnArm(model, lens=True).run,
        "7 shardlens lens steered": OwnArm(model, lens=True, steering=steering).run,
    }
    if model.parallel.size > 1 or not setup.rivals:
        return own
    hf = as_transformers(model)
    return {
        baseline_name(model.dtype): FaithfulBaseline(hf).run,
        "3 transformers lens": CachedLensArm(hf).run,
        "4 paper's method": PaperMethod(hf).run,
        "4 the same, by layer": PaperMethod(hf, by_layer=True).run,
        **own,
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
        return peak_bytes(arms_of(model, setup)[name], name, setup, model.config.vocab_size)


def measure_times_on(
    model: Transformer, arms: dict[str, Run], setup: Setup
) -> dict[str, dict[str, Any]]:
    """By turns; where memory is counted along, the others first, before our cache is there."""
    vocab_size = model.config.vocab_size
    if setup.device.type != "cuda":
        _warm(arms, setup, vocab_size)
        return measure_times(arms, setup, vocab_size)
    model.engine = None
    found: dict[str, dict[str, Any]] = {}
    others = {name: run for name, run in arms.items() if name[0] in "1234"}
    ours = {name: run for name, run in arms.items() if name not in others}
    for part, rounds in ((others, 1), (ours, setup.rounds)):
        _warm(part, setup, vocab_size)
        found |= measure_times(part, dataclasses.replace(setup, rounds=rounds), vocab_size)
    return {name: found[name] for name in arms}


def _warm(arms: dict[str, Run], setup: Setup, vocab_size: int) -> None:
    """Whatever is set up once, with buffers as long as the run's, so that steps are captured."""
    for name, run in arms.items():
        if name not in UNCACHED:
            captures = setup.device.type == "cuda" and name[0] in "567"
            n_tokens = setup.new_tokens if captures else 3
            run(setup.prompt(vocab_size), n_tokens, TOP_K, None)


def measure_peaks(
    model: Transformer, arms: dict[str, Run], setup: Setup, times: dict[str, dict[str, Any]]
) -> dict[str, int]:
    """Bytes above the weights."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peaks = {}
    for name, run in arms.items():
        if setup.device.type == "cuda":
            peaks[name] = times[name]["allocated_bytes"] - weights
        elif model.parallel.size > 1:
            peaks[name] = peak_bytes(run, name, setup, model.config.vocab_size)
        else:
            spawning = ProcessPoolExecutor(1, get_context("spawn"))
            with patch.dict(os.environ, FIXED_ALLOCATOR), spawning as pool:
                threads = torch.get_num_threads()
                peaks[name] = pool.submit(_peak_in_this_process, name, setup, threads).result()
        print(f"{name:26}{peaks[name] / 2**20:12,.1f} MiB above the weights", flush=True)
    return peaks


def make_model(setup: Setup, parallel: TensorParallel) -> Transformer:
    return random_model(model_config(setup.shape), parallel, setup.dtype, setup.device)


@torch.inference_mode()
def run(setup: Setup, parallel: TensorParallel) -> dict[str, Any]:
    """The whole benchmark. Raises ValueError naming what a check found wrong."""
    model = make_model(setup, parallel)
    vocab_size = model.config.vocab_size
    arms, left_out = without_what_does_not_fit(arms_of(model, setup), setup, vocab_size)
    red = problems(model, arms, setup.prompt(vocab_size), CHECKED_TOKENS, TOP_K)
    if red:
        raise ValueError(f"a check is red, nothing is measured: {'; '.join(red)}")
    print("checks: green", flush=True)
    times = measure_times_on(model, arms, setup)
    sent = {}
    if parallel.size > 1:
        sent = {name: _sent_bytes(model, run, setup) for name, run in arms.items()}
    peaks = measure_peaks(model, arms, setup, times)
    rates = measured_rates(setup.device, setup.dtype, 2.0)
    context = setup.prompt_tokens + setup.new_tokens
    planned = plan(
        model.config,
        ranks=parallel.size,
        context=context,
        taps=model.config.n_layers,
        top_k=TOP_K,
        dtype=str(setup.dtype).removeprefix("torch."),
        device_type="cuda" if setup.device.type == "cuda" else "cpu",
    )
    floor_per_s = planned.tokens_per_s(rates.copy_bytes_per_s)
    result: dict[str, Any] = {
        "benchmark": "end_to_end",
        "environment": environment(),
        "shape": setup.shape,
        "model": {
            name: value
            for name, value in vars(model.config).items()
            if isinstance(value, int | float | str)
        },
        "device": setup.device.type,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "ranks": parallel.size,
        "prompt_tokens": setup.prompt_tokens,
        "new_tokens": setup.new_tokens,
        "rounds": setup.rounds,
        "copy_gb_per_s": rates.copy_bytes_per_s / 1e9,
        "moved_bytes_per_token": planned.moved_bytes_per_token,
        "planned_above_weights_bytes": planned.total_bytes - planned.weights_bytes,
        "arms": {
            name: {
                **times[name],
                "peak_bytes": peaks[name],
                "roofline_share": times[name]["tokens_per_s"] / floor_per_s,
                "sent_bytes_per_token": sent.get(name, 0),
            }
            for name in arms
        },
        "left_out": left_out,
    }
    return result | {"claims": verdicts(result)}


def _sent_bytes(model: Transformer, run: Run, setup: Setup) -> float:
    """Bytes this rank sends a new token, prefill included."""
    model.parallel.traffic.reset()
    run(setup.prompt(model.config.vocab_size), setup.new_tokens, TOP_K, None)
    return model.parallel.traffic.total_bytes / setup.new_tokens

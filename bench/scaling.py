"""One generation, read live, on 1, 2 and 4 ranks: equal answers, bytes sent, ratios of time.

    shardlens bench scaling [--ranks 1,2,4] [--save NAME]

Every rank count is a run of its own under shardlens.launcher, on gloo where there is no GPU.
Ranks that share the cores of one machine cannot be faster than one; what counts there is that
tokens and top-k ids are equal, and how many bytes are sent. What more GPUs can give at most,
`shardlens plan` says.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from ..engine import Engine, LensSpec, Request, Sampling
from ..interp import Trace
from ..model.load import default_device
from ..parallel import TensorParallel
from .models import default_dtype, model_config, random_model
from .processes import hand_over, on_ranks
from .report import environment

PROMPT_TOKENS, NEW_TOKENS, TOP_K = 16, 8, 5
# Between rank counts, whose sums are rounded in another order: nats, and ranks of a target far
# down among tens of thousands of nearly equal random logits, where an id lies every 1e-4 nats.
LOGPROB_NATS, TARGET_RANKS = 1e-3, 3


def rank_run(shape: str) -> dict[str, Any]:
    """One generation on the ranks of this process's group, timed at its second run."""
    device = default_device()
    parallel = TensorParallel.from_env(device)
    model = random_model(model_config(shape), parallel, default_dtype(device), device)
    engine = Engine(model)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    sampling, lens = Sampling(1.0, seed=1), LensSpec(top_k=TOP_K)
    for _ in range(2):
        parallel.traffic.reset()
        started = time.perf_counter()
        (found,) = engine.run([Request(prompt, NEW_TOKENS, sampling, lens=lens, stop_ids=())])
        seconds = time.perf_counter() - started
    assert found.record is not None
    trace = Trace.from_record(found.record)
    return {
        "ranks": parallel.size,
        "seconds": seconds,
        "token_ids": prompt + found.tokens,
        "lens_ids": trace.token_ids.tolist(),
        "lens_logprobs": trace.logprobs.tolist(),
        "target_ranks": trace.target_rank.tolist(),
        "sent_bytes": dict(parallel.traffic.sent_bytes),
        "calls": dict(parallel.traffic.calls),
    }


def measured(ranks: int, shape: str) -> dict[str, Any]:
    """`rank_run` on so many processes, which share the cores."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    run: dict[str, Any] = on_ranks(ranks, "shardlens.bench.scaling", ["--shape", shape], threads)
    return run


def difference(run: dict[str, Any], alone: dict[str, Any]) -> str | None:
    for name in ("token_ids", "lens_ids"):
        if run[name] != alone[name]:
            return f"{name} on {run['ranks']} ranks are not those on {alone['ranks']}"
    moved = torch.tensor(run["target_ranks"]) - torch.tensor(alone["target_ranks"])
    if moved.abs().max() > TARGET_RANKS:
        return f"a target's rank on {run['ranks']} ranks is off by {int(moved.abs().max())}"
    gap = torch.tensor(run["lens_logprobs"]) - torch.tensor(alone["lens_logprobs"])
    worst = float(gap.abs().max())
    return None if worst <= LOGPROB_NATS else f"log-probs on {run['ranks']} ranks: {worst:.3g} off"


def scaling(rank_counts: list[int], shape: str) -> dict[str, Any]:
    """Raises ValueError where a rank count gives another answer than the first."""
    runs = [measured(ranks, shape) for ranks in rank_counts]
    for run in runs[1:]:
        wrong = difference(run, runs[0])
        if wrong:
            raise ValueError(f"a check is red: {wrong}")
    n_positions = PROMPT_TOKENS + NEW_TOKENS - 1
    return {
        "benchmark": "scaling",
        "environment": environment(),
        "shape": shape,
        "new_tokens": NEW_TOKENS,
        "runs": [
            {
                "ranks": run["ranks"],
                "time_over_first": run["seconds"] / runs[0]["seconds"],
                "sent_bytes_per_position": sum(run["sent_bytes"].values()) / n_positions,
                "sent_bytes": run["sent_bytes"],
                "calls": run["calls"],
            }
            for run in runs
        ],
    }


def print_scaling(result: dict[str, Any]) -> None:
    print("answers: the same on every rank count")
    print(f"{'ranks':>6}{'time over first':>17}{'sent/position':>17}   by collective")
    for run in result["runs"]:
        sent = ", ".join(f"{name} {size:,}" for name, size in run["sent_bytes"].items())
        print(
            f"{run['ranks']:>6}{run['time_over_first']:>17.2f}"
            f"{run['sent_bytes_per_position']:>17,.0f}   {sent or 'nothing'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="what this run gave, as JSON")
    arguments = parser.parse_args()
    hand_over(rank_run(arguments.shape), arguments.out)


if __name__ == "__main__":
    main()

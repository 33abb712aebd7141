"""One generation, read live, on 1, 2 and 4 ranks: equal answers, bytes sent, ratios of time.

    shardlens bench scaling [--ranks 1,2,4] [--save NAME]

Every rank count is a run of its own under torch.distributed.run, on gloo where there is no GPU.
Ranks that share the cores of one machine cannot be faster than one; what counts there is that
tokens and top-k ids are equal, and how many bytes are sent. Beside
it stands what `plan` says of published models on 1 to 64 GPUs: an upper bound, of memory traffic.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from ..engine import LensSpec, Sampling
from ..engine.plan import GPUS, Plan, plan
from ..language_model import LanguageModel
from ..model.load import default_device
from ..parallel import TensorParallel
from .processes import hand_over, on_ranks
from .report import environment
from .shapes import N_LAYERS, default_dtype, model_config, random_model

PROMPT_TOKENS, NEW_TOKENS, TOP_K = 16, 8, 5
PREDICTED_RANKS = (1, 2, 4, 8, 16, 32, 64)
PREDICTED_CONTEXT, PREDICTED_GPU = 1500, "h200"
# Between rank counts, whose sums are rounded in another order: nats, and ranks of a target far
# down among tens of thousands of nearly equal random logits, where an id lies every 1e-4 nats.
LOGPROB_NATS, TARGET_RANKS = 1e-3, 3


def rank_run(shape: str) -> dict[str, Any]:
    """One generation on the ranks of this process's group, timed at its second run."""
    device = default_device()
    parallel = TensorParallel.from_env(device)
    model = random_model(model_config(shape), parallel, default_dtype(device), device)
    lm = LanguageModel(model)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    for _ in range(2):
        parallel.traffic.reset()
        started = time.perf_counter()
        result = lm.generate(
            prompt,
            max_new_tokens=NEW_TOKENS,
            sampling=Sampling(1.0, seed=1),
            lens=LensSpec(top_k=TOP_K),
            stop_ids=(),
        )
        seconds = time.perf_counter() - started
    trace = result.trace
    assert trace is not None and trace.logprobs is not None and trace.target_rank is not None
    return {
        "ranks": parallel.size,
        "seconds": seconds,
        "token_ids": prompt + result.token_ids,
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
        "predicted": predicted(),
    }


def predicted() -> list[dict[str, Any]]:
    """Tokens/s at most, by model and GPUs, for those that fit."""
    gpu = GPUS[PREDICTED_GPU]
    rows = []
    for name in N_LAYERS:
        config = model_config(name)
        for ranks in PREDICTED_RANKS:
            try:
                planned = plan(
                    config,
                    ranks=ranks,
                    context=PREDICTED_CONTEXT,
                    taps=config.n_layers,
                    dtype="bfloat16",
                )
            except ValueError:  # heads that cannot be shared so
                continue
            rows.append(_row(name, planned, gpu.memory_gib * 2**30, gpu.bandwidth_bytes_per_s))
    return rows


def _row(name: str, planned: Plan, memory_bytes: float, bandwidth: float) -> dict[str, Any]:
    return {
        "model": name,
        "ranks": planned.ranks,
        "gpu": PREDICTED_GPU,
        "total_bytes": planned.total_bytes,
        "fits": planned.total_bytes <= memory_bytes,
        "tokens_per_s_bound": planned.tokens_per_s(bandwidth),
        "sent_bytes_per_token": planned.sent_bytes_per_token,
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
    print(f"\nat most, tokens/s on so many {PREDICTED_GPU}, all layers read (- does not fit)")
    print(f"{'':16}" + "".join(f"{ranks:>8}" for ranks in PREDICTED_RANKS))
    for name in N_LAYERS:
        cells = {row["ranks"]: row for row in result["predicted"] if row["model"] == name}
        line = "".join(
            f"{cells[ranks]['tokens_per_s_bound']:>8,.0f}"
            if ranks in cells and cells[ranks]["fits"]
            else f"{'-':>8}"
            for ranks in PREDICTED_RANKS
        )
        print(f"{name:16}{line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="what this run gave, as JSON")
    arguments = parser.parse_args()
    hand_over(rank_run(arguments.shape), arguments.out)


if __name__ == "__main__":
    main()

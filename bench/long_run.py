"""Memory over a long generation that is read and streamed, and over one whose trace is kept.

    python -m shardlens.bench.long_run [--tokens 10000] [--save NAME]

A small random model with a long context. Streamed, resident memory must not grow with the text:
its key and value cache is there from the start. Kept, it grows by what `plan` computes per
token. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from ..engine import LensSpec, Sampling
from ..engine.plan import plan
from ..interp import Trace
from ..language_model import LanguageModel
from ..model.points import POINTS
from ..parallel import TensorParallel
from .report import emit, environment
from .shapes import model_config, random_model
from .timing import resident_bytes

PROMPT_TOKENS, TOP_K, N_MARKS = 8, 5, 10


def resident_over(lm: LanguageModel, n_tokens: int, mode: str, streamed: bool) -> list[int]:
    """Resident bytes at N_MARKS + 1 evenly spaced tokens of a run, the first after a tenth."""
    every = n_tokens // (N_MARKS + 1)
    marks: list[int] = []
    n_known = n_read = 0

    def on_token(request: int, token: int) -> None:
        nonlocal n_known
        n_known += 1
        if n_known % every == 0:
            marks.append(resident_bytes("VmRSS"))

    def on_lens(request: int, piece: Trace) -> None:
        nonlocal n_read
        n_read += len(piece.positions)

    lm.generate(
        list(range(PROMPT_TOKENS)),
        max_new_tokens=n_tokens,
        sampling=Sampling(1.0),
        lens=LensSpec(points=POINTS, top_k=TOP_K, mode=mode, positions="generated"),
        stop_ids=(),
        on_token=on_token,
        on_lens=on_lens if streamed else None,
    )
    if streamed and n_read != n_tokens:
        raise ValueError(f"{n_read} positions were streamed, not {n_tokens}")
    return marks[: N_MARKS + 1]


def measure(n_tokens: int) -> dict[str, Any]:
    context = PROMPT_TOKENS + n_tokens
    config = dataclasses.replace(model_config("cpu-small"), context=context)
    parallel = TensorParallel.single()
    lm = LanguageModel(random_model(config, parallel, torch.float32, torch.device("cpu")))
    resident_over(lm, 10 * (N_MARKS + 1), "live", True)  # whatever is set up once
    resident_over(lm, 10 * (N_MARKS + 1), "deferred", False)
    taps = config.n_layers * len(POINTS)
    planned = plan(config, ranks=1, context=context, taps=taps, top_k=TOP_K, device_type="cpu")
    streamed = resident_over(lm, n_tokens, "live", True)
    kept = resident_over(lm, n_tokens, "deferred", False)
    between = n_tokens // (N_MARKS + 1) * N_MARKS
    return {
        "tokens": n_tokens,
        "taps": taps,
        "top_k": TOP_K,
        "streamed_growth_bytes_per_token": (streamed[-1] - streamed[0]) / between,
        "kept_growth_bytes_per_token": (kept[-1] - kept[0]) / between,
        "kept_computed_bytes_per_token": planned.kept_bytes_per_token,
        "streamed_resident_bytes": streamed,
        "kept_resident_bytes": kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--save", metavar="NAME", help="keep the result in bench/results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"benchmark": "long_run", "environment": environment(), **measure(arguments.tokens)}
    emit(result, arguments.save)


if __name__ == "__main__":
    main()

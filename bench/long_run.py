"""Memory over a long generation that is read live and streamed, and of one whose trace is kept.

    python -m shardlens.bench.long_run [--tokens 10000] [--save NAME]

A small random model with a long context. Streamed, resident memory must not grow with the text:
its key and value cache is there from the start. Kept, it grows by what `plan` computes for a
token. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from ..engine.generation import generate_tokens
from ..engine.lens_spec import LensSpec
from ..engine.plan import plan
from ..engine.sampling import Sampling
from ..interp.lens import LensRecorder
from ..model.points import POINTS
from ..model.transformer import Transformer
from ..parallel.group import TensorParallel
from .models import model_config, random_model
from .report import emit, environment, resident_bytes

PROMPT_TOKENS, TOP_K, N_MARKS = 8, 5, 10


def resident_over(model: Transformer, n_tokens: int, mode: str, streamed: bool) -> list[int]:
    """Resident bytes at N_MARKS + 1 evenly spaced tokens of a run, the first after a tenth."""
    sequences = [list(range(PROMPT_TOKENS))]
    spec = LensSpec(points=POINTS, top_k=TOP_K, mode=mode, positions="generated")
    pieces = 0

    def on_lens(request: int, piece: Any) -> None:
        nonlocal pieces
        pieces += len(piece.positions)

    recorder = LensRecorder(model, spec, sequences, on_lens if streamed else None)
    marks: list[int] = []
    every = n_tokens // (N_MARKS + 1)

    def on_token(request: int, token: int) -> None:
        if (len(sequences[0]) - PROMPT_TOKENS) % every == 0:
            marks.append(resident_bytes("VmRSS"))

    generate_tokens(
        model,
        sequences,
        max_new_tokens=n_tokens,
        samplings=[Sampling(1.0)],
        observer=recorder,
        on_token=on_token,
    )
    if streamed and pieces != n_tokens:
        raise ValueError(f"{pieces} positions were streamed, not {n_tokens}")
    return marks[: N_MARKS + 1]


def measure(n_tokens: int) -> dict[str, Any]:
    context = PROMPT_TOKENS + n_tokens
    config = dataclasses.replace(model_config("cpu-small"), context=context)
    parallel = TensorParallel.single()
    model = random_model(config, parallel, torch.float32, torch.device("cpu"))
    resident_over(model, 10 * (N_MARKS + 1), "live", True)  # whatever is set up once
    resident_over(model, 10 * (N_MARKS + 1), "deferred", False)
    taps = config.n_layers * len(POINTS)
    planned = plan(config, ranks=1, context=context, taps=taps, top_k=TOP_K, device_type="cpu")
    streamed = resident_over(model, n_tokens, "live", True)
    kept = resident_over(model, n_tokens, "deferred", False)
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

"""The decode step's claims on one GPU, checked and measured at true model shapes.

    python -m shardlens.bench.gpu_end_to_end [--shapes NAME,...] [--seconds 560] [--name h200]

First the tests of captured steps; a red one ends it. Then the shapes in order, as far as the time
goes: against the rivals at the first one, shardlens alone at the others, bf16, 64 + 1,500 tokens,
random weights made on the device. Each shape's result is added to bench/results/NAME.json as soon
as it is there, so that several calls fill one file. Exit code 1 if a check was red.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..parallel.group import TensorParallel
from . import end_to_end
from .arm_measures import Setup
from .end_to_end_report import print_result
from .models import CPU_SHAPES, N_LAYERS
from .report import RESULTS

FIRST = "llama-3.1-8b"
SHAPES = (FIRST, "llama-3.1-70b", "qwen3-4b", "qwen3-14b", "qwen3-32b")
# Seconds that a shape takes, from the bytes of its weights at 4 TB/s; the first with its rivals.
EXPECTED_SECONDS = {FIRST: 260, "llama-3.1-70b": 260, "qwen3-4b": 40, "qwen3-14b": 70}
USUAL_SECONDS = 130
PROMPT_TOKENS, NEW_TOKENS = 64, 1500
ROOT = Path(__file__).resolve().parents[1]


def tests_are_green() -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, "tests/model/test_graphs.py"], cwd=ROOT)
    return run.returncode == 0


def measure(shape: str, rounds: int) -> dict[str, Any]:
    """One shape. On a CPU, which decides nothing, a small one: a rehearsal."""
    on_gpu = torch.cuda.is_available()
    setup = Setup(
        shape=shape,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        device=torch.device("cuda" if on_gpu else "cpu"),
        prompt_tokens=PROMPT_TOKENS if on_gpu else 8,
        new_tokens=NEW_TOKENS if on_gpu else 4,
        rounds=rounds,
        rivals=shape in (FIRST, *CPU_SHAPES),
    )
    result = end_to_end.run(setup, TensorParallel.single())
    print_result(result)
    return result


def keep(path: Path, shape: str, result: dict[str, Any]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content[shape] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="h200")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    shapes = arguments.shapes.split(",")
    unknown = [shape for shape in shapes if shape not in (*N_LAYERS, *CPU_SHAPES)]
    if unknown:
        parser.error(f"shape {unknown[0]}: there are {', '.join(N_LAYERS)}")
    deadline = time.monotonic() + arguments.seconds
    if not tests_are_green():
        print("RED: tests of captured steps")
        return 1
    red = 0
    for shape in shapes:
        if time.monotonic() + EXPECTED_SECONDS.get(shape, USUAL_SECONDS) > deadline:
            print(f"out of time: {shape} is left for another call")
            continue
        try:
            keep(arguments.out / f"{arguments.name}.json", shape, measure(shape, arguments.rounds))
        except (ValueError, torch.OutOfMemoryError) as error:
            red += isinstance(error, ValueError)
            print(f"{shape}: {str(error).splitlines()[0]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return min(1, red)


if __name__ == "__main__":
    sys.exit(main())

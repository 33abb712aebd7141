"""`shardlens bench`: measure this machine.

`bench kernels` times every operation at true model shapes, on one device: under torchrun, rank 0
measures and the others leave. `bench end-to-end` compares whole generations; on several ranks only
shardlens's own. `bench scaling` and `bench ranks` start their ranks themselves. `bench steer-sweep`
measures on one.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from .bench import end_to_end, rank_agreement, scaling, steer_sweep
from .bench.end_to_end_runs import Setup
from .bench.kernel_report import run_grid
from .bench.kernels import OPS, cases
from .bench.models import CPU_SHAPES, GRIDS, N_LAYERS, default_dtype, model_config
from .bench.report import RESULTS, emit
from .cli import is_printing_rank
from .engine.files import check_writable, write_json
from .model.load import default_device
from .parallel.group import TensorParallel


def add_to(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure this machine")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_kernels(benchmarks)
    _add_end_to_end(benchmarks)
    _add_scaling(benchmarks)
    _add_ranks(benchmarks)
    _add_steer_sweep(benchmarks)


def _add_end_to_end(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "end-to-end", help="generation with all layers read, against the paper and transformers"
    )
    parser.add_argument(
        "--shape",
        choices=(*CPU_SHAPES, *N_LAYERS),
        help="default: llama-3.1-8b with a GPU, cpu without: 16 layers, d 1,024, V 32,000",
    )
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, help="default: 1500 with a GPU, 128 without")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each (default: 3)")
    _add_outputs(parser)
    parser.set_defaults(run=run_end_to_end)


def _add_scaling(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "scaling", help="the same generation on 1, 2 and 4 ranks: equal answers, and bytes sent"
    )
    parser.add_argument("--ranks", default="1,2,4", metavar="P,...", help="default: 1,2,4")
    parser.add_argument("--shape", choices=(*CPU_SHAPES, *N_LAYERS), default="cpu")
    _add_outputs(parser)
    parser.set_defaults(run=run_scaling)


def _add_ranks(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "ranks", help="how far greedy texts on more ranks differ, in float32 and in bfloat16"
    )
    parser.add_argument("--model", default="demo", help="directory, hub id or demo (the default)")
    parser.add_argument(
        "--ranks", default="1,2,4", metavar="P,...", help="default: 1,2,4; the first is compared to"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a JSON list of texts or of lists of token ids (default: 8 short texts)",
    )
    _add_outputs(parser)
    parser.set_defaults(run=run_ranks)


def _add_steer_sweep(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "steer-sweep",
        help="steering at all layers and multipliers in one pass, against a pass for each",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default: 5)")
    _add_outputs(parser)
    parser.set_defaults(run=run_steer_sweep)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", metavar="NAME", help="keep the result as bench/results/NAME.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def _check_outputs(arguments: argparse.Namespace) -> None:
    if arguments.save is not None and not re.fullmatch(r"[\w.-]+", arguments.save):
        raise ValueError(f"--save {arguments.save}: a name of letters, digits, '.', '_' and '-'")
    if arguments.json is not None:
        check_writable(arguments.json)


def _finish(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    emit(result, arguments.save)
    if arguments.json is not None:
        write_json(arguments.json, result)


def run_end_to_end(arguments: argparse.Namespace) -> None:
    device = default_device()
    on_gpu = device.type == "cuda"
    new_tokens = arguments.new_tokens or (1500 if on_gpu else 128)
    for name, value in (("prompt", arguments.prompt_tokens), ("new", new_tokens)):
        if value < 2:
            raise ValueError(f"--{name}-tokens {value} is below 2")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds {arguments.rounds} is below 1")
    shape = arguments.shape or ("llama-3.1-8b" if on_gpu else "cpu")
    context = model_config(shape).context
    if arguments.prompt_tokens + new_tokens > context:
        raise ValueError(
            f"{arguments.prompt_tokens} + {new_tokens} tokens exceed the context of {context}"
        )
    _check_outputs(arguments)
    dtype = default_dtype(device)
    setup = Setup(shape, dtype, device, arguments.prompt_tokens, new_tokens, arguments.rounds)
    result = end_to_end.run(setup, TensorParallel.from_env(device))
    if not is_printing_rank():
        return
    end_to_end.print_result(result)
    _finish(arguments, result)
    if arguments.save is not None:
        end_to_end.plot(result, RESULTS / f"{arguments.save}.png")


def _rank_counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"--ranks {text} cannot be read: write e.g. 1,2,4")
    return [int(part) for part in text.split(",")]


def run_ranks(arguments: argparse.Namespace) -> None:
    rank_counts = _rank_counts(arguments.ranks)
    if not is_printing_rank():
        return
    _check_outputs(arguments)
    result = rank_agreement.rank_agreement(arguments.model, rank_counts, arguments.prompts)
    rank_agreement.print_result(result)
    _finish(arguments, result)


def run_scaling(arguments: argparse.Namespace) -> None:
    rank_counts = _rank_counts(arguments.ranks)
    if not is_printing_rank():
        return
    _check_outputs(arguments)
    result = scaling.scaling(rank_counts, arguments.shape)
    scaling.print_scaling(result)
    _finish(arguments, result)


def run_steer_sweep(arguments: argparse.Namespace) -> None:
    if arguments.rounds < 2:
        raise ValueError(f"--rounds {arguments.rounds} is below 2")
    if not is_printing_rank():
        return
    _check_outputs(arguments)
    result = steer_sweep.steer_sweep(arguments.rounds, default_device())
    steer_sweep.print_result(result)
    _finish(arguments, result)


def _add_kernels(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "kernels", help="each operation at true model shapes, against other implementations"
    )
    parser.add_argument(
        "--ops", metavar="OP,...", default=",".join(OPS), help=f"default: all, {','.join(OPS)}"
    )
    parser.add_argument(
        "--grid", choices=tuple(GRIDS), help="default: full with a GPU, small without"
    )
    parser.add_argument(
        "--save", metavar="NAME", help="keep bench/results/NAME.csv, .json and .png"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.set_defaults(run=run_kernels)


def run_kernels(arguments: argparse.Namespace) -> None:
    ops = list(filter(None, arguments.ops.split(",")))
    if not ops:
        raise ValueError(f"no operation is named: there are {', '.join(OPS)}")
    device = default_device()
    grid = arguments.grid or ("full" if device.type == "cuda" else "small")
    cases(grid, ops)  # refuses unknown names, on every rank
    if not is_printing_rank():
        return
    _check_outputs(arguments)
    result = run_grid(grid, ops, device, arguments.save)
    if arguments.json is not None:
        write_json(arguments.json, result)

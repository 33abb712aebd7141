"""`shardlens bench`: measure this machine.

`bench kernels` times every operation at true model shapes, on one device: under torchrun, rank 0
measures and the others leave.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from .bench.kernels import run_grid
from .bench.shapes import GRIDS, OPS, cases
from .interp.output import check_writable, write_json
from .model.load import default_device
from .session import is_printing_rank


def add_to(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure this machine")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_kernels(benchmarks)


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
    if arguments.save is not None and not re.fullmatch(r"[\w.-]+", arguments.save):
        raise ValueError(f"--save {arguments.save}: a name of letters, digits, '.', '_' and '-'")
    device = default_device()
    grid = arguments.grid or ("full" if device.type == "cuda" else "small")
    cases(grid, ops)  # refuses unknown names, on every rank
    if not is_printing_rank():
        return
    if arguments.json is not None:
        check_writable(arguments.json)
    result = run_grid(grid, ops, device, arguments.save)
    if arguments.json is not None:
        write_json(arguments.json, result)

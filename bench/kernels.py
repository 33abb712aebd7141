"""Microbenchmarks of the kernels at true model shapes: `./launch.sh bench kernels`.

Per case (an operation at a shape) the arms are checked against float64, then timed by turns:

    shardlens   what `auto` takes: Triton kernels on CUDA, PyTorch references on a CPU
    eager       the operation in plain PyTorch          compile   the same under torch.compile
    others      PyTorch's own operator, and the extra `rivals`, where there is one for the work
    product     (head) the matrix product alone, for scale

GB/s and TFLOP/s are what the operation must move and compute, see `kernel_arms.py`, over p50: an
arm that moves more has that much less. The floor of a case is the longer of bytes over the
measured copy bandwidth and operations over the measured matrix rate; `roofline_share` is floor
over p50. Bytes alone, over p50, are also given as `copy_bandwidth_share`, of that measured
bandwidth, and as `nominal_bandwidth_share`, of the data sheet's, where the card is known. `noise`
is what two timings of our own arm, taken in turn with the others, differ by.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine.files import replacing
from ..kernels.triton_shim import HAS_TRITON
from . import rivals
from .kernel_arms import BY_NAME, COMPILED, DTYPES, EAGER, OURS, Cost
from .kernel_checks import Checker, RedCheck
from .kernel_plot import plot
from .report import RESULTS, bandwidth_shares, emit, environment
from .rivals import Arm
from .shapes import Case, cases
from .timing import (
    Rates,
    Run,
    Times,
    interleaved,
    measured_rates,
    one_thread,
    peak_extra_bytes,
    set_count,
)

COLUMNS = (
    "op variant shape used_by dtype arm how p20_ms p50_ms p80_ms rounds bytes operations "
    "gb_per_s tflop_per_s copy_bandwidth_share nominal_bandwidth_share bound roofline_share "
    "peak_extra_bytes noise hardware commit"
).split()
SECONDS_PER_CASE = {"cuda": 0.5, "cpu": 2.0}
SECONDS_FOR_RATES = 2.0
AGAIN = "shardlens again"
FLOORS = {"bytes": "measured copy bandwidth", "operations": "the measured matrix rate"}
LEFT_OUT_WIDTH = 160  # of an error's text
Row = dict[str, Any]


@dataclass
class Bench:
    """The device, its rates, and what was found so far."""

    device: torch.device
    rates: Rates
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # case and arm -> why
    skipped: list[str] = field(default_factory=list)  # cases that time ran out for

    @classmethod
    def on(cls, device: torch.device) -> Bench:
        return cls(device, measured_rates(device, DTYPES[device.type], SECONDS_FOR_RATES))

    def drop(self, op: str) -> None:
        """Throw away what was measured of an operation."""
        self.rows = [row for row in self.rows if row["op"] != op]


def paths_text(device: torch.device) -> str:
    """Which code ran, for people."""
    if device.type == "cpu":
        return (
            "CPU paths (PyTorch references) on one thread: they say little of the kernels on a GPU"
        )
    kernels = "Triton kernels" if HAS_TRITON else "PyTorch references: Triton is missing"
    return f"{kernels}, on {torch.cuda.get_device_name(device)}"


def full_environment() -> dict[str, Any]:
    triton_version = __import__("triton").__version__ if HAS_TRITON else None
    return environment() | {"triton": triton_version, "rivals": rivals.versions()}


def arms_of(case: Case, device: torch.device, compiled: bool = True) -> dict[str, Arm]:
    """Ours first. Rivals need CUDA."""
    op = BY_NAME[case.op]
    arms: dict[str, Arm] = {
        OURS: lambda given: op.ours(**given),
        EAGER: lambda given: op.reference(**given),
    }
    if compiled:
        torch._dynamo.reset()  # else, after eight shapes, it would silently run eagerly
        whole = torch.compile(op.reference, fullgraph=True, dynamic=False)
        arms[COMPILED] = lambda given: whole(**given)
    arms |= op.more_arms(case)
    return arms | (rivals.rivals_of(case.op, case.variant)[0] if device.type == "cuda" else {})


@torch.no_grad()
def measure(
    bench: Bench, case: Case, seconds: float | None = None, compiled: bool = True
) -> list[Row]:
    """Check and time one case; its rows, also added to `bench`. Raises RedCheck."""
    device, op = bench.device, BY_NAME[case.op]
    cost = op.cost(case)
    sets = [op.make(case, device) for _ in range(set_count(cost.bytes, device))]
    arms = _green_arms(bench, case, arms_of(case, device, compiled), sets[0])
    peaks = {name: peak_extra_bytes(arm, sets[0], device) for name, arm in arms.items()}
    timed: dict[str, Run] = {**arms, AGAIN: arms[OURS]}
    times = interleaved(timed, sets, device, seconds or SECONDS_PER_CASE[device.type])
    noise = abs(times[AGAIN].p50_ms / times[OURS].p50_ms - 1)
    rows = [
        _names(case)
        | {"arm": name}
        | _figures(times[name], cost, bench.rates)
        | _shares(cost.bytes / times[name].p50_ms * 1e3, bench)
        | {"peak_extra_bytes": peaks[name], "noise": round(noise, 4)}
        for name in arms
    ]
    bench.rows.extend(rows)
    return rows


def _green_arms(
    bench: Bench, case: Case, arms: dict[str, Arm], given: dict[str, Any]
) -> dict[str, Arm]:
    """The arms whose results are right. A rival that fails or is wrong is left out, and named."""
    for name, why in rivals.rivals_of(case.op, case.variant)[1].items():
        bench.left_out[f"{case.op} {case.variant}: {name}"] = why
    checker = Checker(case, given)
    green = {}
    for name, arm in arms.items():
        try:
            problem = checker.problem(name, arm)
        except Exception as error:
            if name == OURS:
                raise
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            green[name] = arm
        elif name == OURS:
            raise RedCheck(f"{case.label}: {problem}")
        else:
            bench.left_out[f"{case.label}: {name}"] = problem[:LEFT_OUT_WIDTH]
    return green


def _names(case: Case) -> Row:
    return {
        "op": case.op,
        "variant": case.variant,
        "shape": case.shape,
        "used_by": " ".join(case.used_by),
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def _figures(times: Times, cost: Cost, rates: Rates) -> Row:
    seconds = times.p50_ms / 1e3
    moving = cost.bytes / rates.copy_bytes_per_s
    computing = cost.operations / rates.matrix_flop_per_s
    return {
        "how": times.how,
        "p20_ms": round(times.p20_ms, 6),
        "p50_ms": round(times.p50_ms, 6),
        "p80_ms": round(times.p80_ms, 6),
        "rounds": times.rounds,
        "bytes": cost.bytes,
        "operations": cost.operations,
        "gb_per_s": round(cost.bytes / seconds / 1e9, 3),
        "tflop_per_s": round(cost.operations / seconds / 1e12, 6),
        "bound": "bytes" if moving >= computing else "operations",
        "roofline_share": round(max(moving, computing) / seconds, 4),
    }


def _shares(bytes_per_s: float, bench: Bench) -> Row:
    shares = bandwidth_shares(bytes_per_s, bench.rates.copy_bytes_per_s, bench.device)
    return {name: None if share is None else round(share, 4) for name, share in shares.items()}


def print_case(case: Case, rows: Sequence[Row]) -> None:
    print(f"{case.label}   [{' '.join(case.used_by)}]")
    for row in rows:
        peak, nominal = row["peak_extra_bytes"], row["nominal_bandwidth_share"]
        if nominal is None or row["bound"] != "bytes":
            of_nominal = ""
        else:
            of_nominal = f", {nominal:.1%} of nominal bandwidth"
        print(
            f"  {row['arm']:12} {row['p50_ms']:10.4f} ms ({row['p20_ms']:.4f} to "
            f"{row['p80_ms']:.4f}) {row['gb_per_s']:9.1f} GB/s {row['tflop_per_s']:9.3f} TFLOP/s "
            f"{row['roofline_share']:7.1%} of {FLOORS[row['bound']]}{of_nominal}  "
            f"{'?' if peak is None else f'{peak / 2**20:.1f}':>7} MiB  {row['how']}",
            flush=True,
        )


def label_of(row: Row) -> str:
    """The label of the row's case."""
    return " ".join(filter(None, (row["op"], row["variant"], row["shape"])))


def summary(bench: Bench, name: str) -> dict[str, Any]:
    """The result as one JSON object: head, rates, and per case its p50 and share by arm."""
    by_case: dict[str, Row] = {}
    for row in bench.rows:
        case = by_case.setdefault(label_of(row), {"p50_ms": {}, "roofline_share": {}})
        for figure in case:
            case[figure][row["arm"]] = row[figure]
    return {
        "benchmark": name,
        "environment": full_environment(),
        "device": bench.device.type,
        "paths": paths_text(bench.device),
        **rates_and_noise(bench),
        "cases": by_case,
        "left_out": bench.left_out,
        "skipped": bench.skipped,
    }


def rates_and_noise(bench: Bench) -> dict[str, Any]:
    """What the figures are held against, and how far to trust them."""
    noise = [row["noise"] for row in bench.rows if row["arm"] == OURS]
    return {
        "copy_gb_per_s": round(bench.rates.copy_bytes_per_s / 1e9, 2),
        "matrix_tflop_per_s": round(bench.rates.matrix_flop_per_s / 1e12, 3),
        "noise_median": round(statistics.median(noise), 4) if noise else None,
        "noise_worst": max(noise) if noise else None,
    }


def write_csv(bench: Bench, result: dict[str, Any], path: Path) -> None:
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        where = {name: result["environment"][name] for name in ("hardware", "commit")}
        writer.writerows(row | where for row in bench.rows)


def run_grid(
    grid: str, ops: Sequence[str], device: torch.device, save: str | None = None
) -> dict[str, Any]:
    """Measure a grid and print it, the JSON line last. Kept in bench/results/ if `save` is given.

    Raises RedCheck, and reports nothing, where a result of ours is wrong.
    """
    chosen = cases(grid, ops, DTYPES[device.type])
    print(f"{len(chosen)} cases, grid {grid}. {paths_text(device)}.", flush=True)
    with one_thread():
        bench = Bench.on(device)
        for case in chosen:
            print_case(case, measure(bench, case))
        result = summary(bench, "kernels") | {"grid": grid}
    print(
        f"copy {result['copy_gb_per_s']} GB/s, matrix product {result['matrix_tflop_per_s']} "
        f"TFLOP/s; two timings of one arm differ by {result['noise_median']:.1%} (median), "
        f"{result['noise_worst']:.1%} (worst)"
    )
    for arm, why in bench.left_out.items():
        print(f"left out: {arm}: {why}")
    if save is not None:
        RESULTS.mkdir(exist_ok=True)
        write_csv(bench, result, RESULTS / f"{save}.csv")
        plot(bench.rows, paths_text(device), RESULTS / f"{save}.png")
    emit(result, save)
    return result

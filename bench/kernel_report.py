"""`shardlens bench kernels`: operations at true model shapes, as a table, files and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine.files import replacing
from ..kernels.triton_shim import HAS_TRITON
from .kernels import Bench, cases, measure, rival_versions
from .models import default_dtype
from .op import OURS, Case, Row, label
from .report import RESULTS, emit, environment, figure_or_none
from .timing import one_thread

COLUMNS = (
    "op variant shape used_by dtype impl how p20_ms p50_ms p80_ms rounds bytes operations "
    "gb_per_s tflop_per_s copy_bandwidth_share nominal_bandwidth_share bound roofline_share "
    "peak_extra_bytes noise hardware commit"
).split()
FLOORS = {"bytes": "measured copy bandwidth", "operations": "the measured matrix rate"}
PANELS_PER_LINE = 2
WIDTH, HEIGHT = 5.2, 2.7  # inches, of one panel
OURS_STYLE = {"marker": "o", "color": "black", "zorder": 3}
MARKERS = "sv^DPX*"


def run_grid(
    grid: str, ops: Sequence[str], device: torch.device, save: str | None = None
) -> dict[str, Any]:
    """Measure a grid and print it, the JSON line last. Kept in bench/results/ if `save` is given.

    Raises RedCheck, and reports nothing, where a result of ours is wrong.
    """
    chosen = cases(grid, ops, default_dtype(device))
    print(f"{len(chosen)} cases, grid {grid}. {paths_text(device)}.", flush=True)
    with one_thread():
        bench = Bench.on(device)
        for case in chosen:
            print_case(case, measure(bench, case))
        result = summary(bench) | {"grid": grid}
    print_rates(bench)
    if save is not None:
        RESULTS.mkdir(exist_ok=True)
        write_csv(bench, result, RESULTS / f"{save}.csv")
        plot(bench.rows, paths_text(device), RESULTS / f"{save}.png")
    emit(result, save)
    return result


def paths_text(device: torch.device) -> str:
    """The code that ran, for people."""
    if device.type == "cpu":
        return (
            "CPU paths (PyTorch references) on one thread: they say little of the kernels on a GPU"
        )
    kernels = "Triton kernels" if HAS_TRITON else "PyTorch references: Triton is missing"
    return f"{kernels}, on {torch.cuda.get_device_name(device)}"


def full_environment() -> dict[str, Any]:
    """`environment`, with the versions of Triton and of the rivals."""
    triton_version = __import__("triton").__version__ if HAS_TRITON else None
    return environment() | {"triton": triton_version, "rivals": rival_versions()}


def print_case(case: Case, rows: Sequence[Row]) -> None:
    print(f"{case.label}   [{' '.join(case.used_by)}]")
    for row in rows:
        peak, nominal = row["peak_extra_bytes"], row["nominal_bandwidth_share"]
        if nominal is None or row["bound"] != "bytes":
            of_nominal = ""
        else:
            of_nominal = f", {nominal:.1%} of nominal bandwidth"
        print(
            f"  {row['impl']:12} {row['p50_ms']:10.4f} ms ({row['p20_ms']:.4f} to "
            f"{row['p80_ms']:.4f}) {row['gb_per_s']:9.1f} GB/s {row['tflop_per_s']:9.3f} TFLOP/s "
            f"{row['roofline_share']:7.1%} of {FLOORS[row['bound']]}{of_nominal}  "
            f"{'?' if peak is None else f'{peak / 2**20:.1f}':>7} MiB  {row['how']}",
            flush=True,
        )


def summary(bench: Bench) -> dict[str, Any]:
    """The result as one JSON object: head, rates, and per case its p50 and share by impl."""
    by_case: dict[str, Row] = {}
    for row in bench.rows:
        name = label(row["op"], row["variant"], row["shape"])
        case = by_case.setdefault(name, {"p50_ms": {}, "roofline_share": {}})
        for figure in case:
            case[figure][row["impl"]] = row[figure]
    return {
        "benchmark": "kernels",
        "environment": full_environment(),
        "device": bench.device.type,
        "paths": paths_text(bench.device),
        **rates_and_noise(bench),
        "cases": by_case,
        "left_out": bench.left_out,
        "skipped": bench.skipped,
    }


def rates_and_noise(bench: Bench) -> dict[str, Any]:
    """The rates that figures are held against, and the noise: how far to trust them."""
    noise = [row["noise"] for row in bench.rows if row["impl"] == OURS]
    return {
        "copy_gb_per_s": round(bench.rates.copy_bytes_per_s / 1e9, 2),
        "matrix_tflop_per_s": round(bench.rates.matrix_flop_per_s / 1e12, 3),
        "noise_median": round(statistics.median(noise), 4) if noise else None,
        "noise_worst": max(noise) if noise else None,
    }


def print_rates(bench: Bench) -> None:
    """The machine's rates, how far to trust the figures, and what has none."""
    rates = rates_and_noise(bench)
    print(
        f"copy {rates['copy_gb_per_s']} GB/s, matrix product {rates['matrix_tflop_per_s']} TFLOP/s"
    )
    if bench.rows:
        print(
            f"two timings of one implementation differ by {rates['noise_median']:.1%} (median), "
            f"{rates['noise_worst']:.1%} (worst)"
        )
    for what, why in bench.left_out.items():
        print(f"left out: {what}: {why}")


def write_csv(bench: Bench, result: dict[str, Any], path: Path) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    machine = {name: result["environment"][name] for name in ("hardware", "commit")}
    writer.writerows(row | machine for row in bench.rows)
    with replacing(path) as file:
        file.write(table.getvalue().encode())


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """A PNG: share of the roofline against the bytes that must move, a panel per operation."""
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    lines = -(-len(panels) // PANELS_PER_LINE)
    figure = figure_or_none(WIDTH * PANELS_PER_LINE, HEIGHT * lines + 0.6)
    if figure is None:
        return
    axes = figure.subplots(lines, PANELS_PER_LINE, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, [row for row in rows if _panel(row) == panel], impls)
        axis.set_title(panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=100)


def _panel(row: Row) -> str:
    return f"{row['op']} {row['variant']}".strip()


def _draw(axis: Any, rows: list[Row], impls: list[str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for index, impl in enumerate(impls):
        style = OURS_STYLE if index == 0 else {"marker": MARKERS[index % len(MARKERS)]}
        points = [row for row in rows if row["impl"] == impl]
        if points:
            sizes = [row["bytes"] / 2**20 for row in points]
            shares = [row["roofline_share"] for row in points]
            axis.scatter(sizes, shares, label=impl, s=22, alpha=0.8, **style)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="MiB that must move", ylabel="share of the floor")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small", ncols=2)

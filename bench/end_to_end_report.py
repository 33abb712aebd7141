"""What is claimed of an end-to-end result, and its table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arm_measures import LENS, PAPER, PLAIN, STEERED, UNCACHED

# What must be reached on a CPU and on a GPU: (claim, ours, other, on CPU, on GPU)
SPEEDS = (
    ("speed with lens over without", LENS, PLAIN, 0.85, 0.97),
    ("speed with lens and steering over without", STEERED, PLAIN, None, 0.96),
    ("speed with lens over the paper's method", LENS, PAPER, 1.2, 5.0),
    ("speed with lens over the baseline", LENS, "baseline", 41.0, 100.0),
)
MEMORIES = (
    ("memory with lens over the paper's method", LENS, PAPER, 1 / 7),
    ("memory with lens over the baseline", LENS, "baseline", 1 / 40),
)
CLAIMED_CPU_SHAPE = "cpu"
# Without lens, on a GPU: of the bandwidth that a copy was measured to reach on this machine, reads
# and writes counted, which is some tenth less than the data sheet's.
LEAST_COPY_BANDWIDTH_SHARE = 0.75


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim of which both arms were measured, its figure, and whether it is met."""
    arms = dict(result["arms"])
    for name in UNCACHED:
        if name in arms:
            arms.setdefault("baseline", arms[name])
    on_gpu = result["device"] != "cpu"
    is_claimed = on_gpu or result["shape"] == CLAIMED_CPU_SHAPE
    found = []
    for text, ours, other, on_cpu_target, on_gpu_target in SPEEDS:
        if ours in arms and other in arms:
            figure = arms[ours]["tokens_per_s"] / arms[other]["tokens_per_s"]
            target = on_gpu_target if on_gpu else on_cpu_target
            found.append(_verdict(text, figure, target if is_claimed else None, False))
    for text, ours, other, target in MEMORIES:
        if ours in arms and other in arms and arms[other]["peak_bytes"]:
            figure = arms[ours]["peak_bytes"] / arms[other]["peak_bytes"]
            found.append(_verdict(text, figure, target if is_claimed else None, True))
    shares = ("measured copy", "copy_bandwidth_share"), ("nominal", "nominal_bandwidth_share")
    for of, name in shares:
        share = arms[PLAIN][name] if PLAIN in arms else None
        if share is not None:
            is_target = on_gpu and of == "measured copy"
            target = LEAST_COPY_BANDWIDTH_SHARE if is_target else None
            found.append(_verdict(f"share of {of} bandwidth without lens", share, target, False))
    return found


def _verdict(text: str, figure: float, target: float | None, below: bool) -> dict[str, Any]:
    met = None if target is None else (figure <= target if below else figure >= target)
    return {"claim": text, "figure": figure, "target": target, "below": below, "met": met}


def print_result(result: dict[str, Any]) -> None:
    print(f"{'':26}{'':33}{'of measured':>16}{'of nominal':>13}")
    headings = ("tokens/s", "first, ms", "MiB")
    print(
        f"{'arm':26}"
        + "".join(f"{heading:>11}" for heading in headings)
        + f"{'copy bandwidth':>16}{'bandwidth':>13}{'sent/token':>11}"
    )
    for name, arm in result["arms"].items():
        mark = "*" if arm["extrapolated"] else " "
        nominal = arm["nominal_bandwidth_share"]
        of_nominal = "-" if nominal is None else f"{nominal:.1%}"
        print(
            f"{name:26}{arm['tokens_per_s']:>10.3f}{mark}{arm['first_token_ms']:>11,.1f}"
            f"{arm['peak_bytes'] / 2**20:>11,.1f}{arm['copy_bandwidth_share']:>16.1%}"
            f"{of_nominal:>13}{arm['sent_bytes_per_token']:>11,.0f}"
        )
    if any(arm["extrapolated"] for arm in result["arms"].values()):
        print("* extrapolated from single tokens at three lengths")
    for name, why in result["left_out"].items():
        print(f"left out: {name}: {why}")
    for verdict in result["claims"]:
        word = {True: "met", False: "NOT MET", None: "no target"}[verdict["met"]]
        bound = ""
        if verdict["target"] is not None:
            bound = f"{'at most' if verdict['below'] else 'at least'} {verdict['target']:.3g}"
        print(f"{verdict['claim']:48}{verdict['figure']:>9.3f}  {bound:15}{word}")


def plot(result: dict[str, Any], path: Path) -> None:
    """A PNG of speed and memory by arm. Without matplotlib there is none, and a line says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: it needs matplotlib (pip install 'shardlens[plot]')")
        return
    names: Sequence[str] = list(result["arms"])
    figure = Figure(figsize=(9, 0.5 * len(names) + 1.4), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    panels = (
        (speed, "tokens/s", [arm["tokens_per_s"] for arm in result["arms"].values()]),
        (memory, "MiB above weights", [a["peak_bytes"] / 2**20 for a in result["arms"].values()]),
    )
    for axis, label, values in panels:
        colours = ["black" if "shardlens" in name else "grey" for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [f"{value:,.3g}" for value in values], padding=3, fontsize="small")
        axis.set(xscale="log", xlabel=label)
        axis.margins(x=0.25)
    speed.invert_yaxis()
    figure.suptitle(
        f"{result['shape']}, {result['dtype']}, {result['prompt_tokens']} + "
        f"{result['new_tokens']} tokens, {result['environment']['hardware']}",
        fontsize="small",
    )
    figure.savefig(path, dpi=100)

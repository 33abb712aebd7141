"""The picture of a run: share of the roofline against the bytes that must move, by operation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = 2
WIDTH, HEIGHT = 5.2, 2.7  # inches, of one panel
OURS_STYLE = {"marker": "o", "color": "black", "zorder": 3}
MARKERS = "sv^DPX*"


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG. Without matplotlib there is none, and a line says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: it needs matplotlib (pip install 'shardlens[plot]')")
        return
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(WIDTH * COLUMNS, HEIGHT * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, [row for row in rows if _panel(row) == panel], arms)
        axis.set_title(panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=100)


def _panel(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['variant']}".strip()


def _draw(axis: Any, rows: list[dict[str, Any]], arms: list[str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for place, arm in enumerate(arms):
        style = OURS_STYLE if place == 0 else {"marker": MARKERS[place % len(MARKERS)]}
        points = [row for row in rows if row["arm"] == arm]
        if points:
            sizes = [row["bytes"] / 2**20 for row in points]
            shares = [row["roofline_share"] for row in points]
            axis.scatter(sizes, shares, label=arm, s=22, alpha=0.8, **style)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="MiB that must move", ylabel="share of the floor")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small", ncols=2)

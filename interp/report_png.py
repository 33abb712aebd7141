"""A SteerabilityReport as a picture: the best tap's curves, and a map of layers and multipliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..engine.files import replacing, require
from .report import SteerabilityReport

# More lines of single items than this hide one another.
SHOWN_ITEMS = 50
# More rows than this have no room for a number each.
LABELLED_LAYERS = 24


def write_png(report: SteerabilityReport, path: Path) -> None:
    """Draw `report` to `path`, or raise ValueError where matplotlib is missing.

    Left: propensity against the multiplier at the best tap, items thin, their mean thick, the
    control's mean dashed. Right: mean propensity by layer and multiplier at the point of the best
    tap; other points, whose layers would need maps of their own, are left to the JSON file.
    """
    check_matplotlib(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_layers = len(report.taps_of(report.taps[report.best].point))
    height = min(9.0, 3.6 + 0.12 * n_layers)
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    curves, layers = figure.subplots(1, 2)
    _draw_curves(report, curves)
    image = _draw_map(report, layers)
    figure.colorbar(image, ax=layers, label="mean propensity")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def check_matplotlib(path: Path) -> None:
    """Raise ValueError if pictures cannot be drawn here."""
    require("matplotlib", "plot", str(path))


def _draw_curves(report: SteerabilityReport, axes: Any) -> None:
    order = np.argsort(report.multipliers)
    steps = np.asarray(report.multipliers)[order]
    tap, slope = report.taps[report.best], report.slopes[report.best]
    items = report.propensities[report.best]
    # Evenly spread over the items, which may be sorted by something.
    shown = np.unique(np.linspace(0, len(items) - 1, min(SHOWN_ITEMS, len(items))).round())
    axes.plot(steps, items[shown.astype(int)][:, order].T, color="grey", alpha=0.3, linewidth=0.7)
    mean, control = report.curves[report.best], report.control_curves[report.best]
    axes.plot(steps, mean[order], color="tab:blue", linewidth=2.5, label="mean over items")
    axes.plot(steps, control[order], "--", color="black", linewidth=1.5, label="random vectors")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="multiplier", ylabel="propensity")
    axes.set_title(
        f"layer {tap.layer} {tap.point}: slope {slope.mean:+.3f} "
        f"(95% {slope.low:+.3f} to {slope.high:+.3f})",
        fontsize="medium",
    )
    axes.legend(fontsize="small")


def _draw_map(report: SteerabilityReport, axes: Any) -> Any:
    order = np.argsort(report.multipliers)
    point = report.taps[report.best].point
    indices = report.taps_of(point)
    means = report.curves[indices]
    # White is the unsteered propensity, the same at every tap, or what is nearest to unsteered.
    centre = float(means[:, report.reference].mean())
    reach = float(np.abs(means - centre).max()) or 1.0
    image = axes.imshow(
        means[:, order],
        aspect="auto",
        origin="lower",
        cmap="RdBu",
        vmin=centre - reach,
        vmax=centre + reach,
        interpolation="nearest",
    )
    axes.set_xticks(range(len(order)), [f"{report.multipliers[step]:g}" for step in order])
    rows = range(0, len(indices), -(-len(indices) // LABELLED_LAYERS))
    axes.set_yticks(rows, [str(report.taps[indices[row]].layer) for row in rows])
    axes.set(xlabel="multiplier", ylabel="layer")
    title = f"{point} (best layer framed"
    _frame(axes, indices.index(report.best), len(order), "-")
    if report.suggested in report.taps and report.suggested.point == point:
        row = indices.index(report.taps.index(report.suggested))
        _frame(axes, row, len(order), ":")
        title += ", suggested dotted"
    axes.set_title(f"{title})", fontsize="medium")
    return image


def _frame(axes: Any, row: int, width: int, line: str) -> None:
    """Mark a row of the map."""
    from matplotlib.patches import Rectangle

    frame = Rectangle((-0.5, row - 0.5), width, 1, fill=False, linestyle=line, linewidth=2)
    axes.add_patch(frame)
    frame.set_clip_on(False)  # of a row at the edge, half the line would be cut off

"""A picture of steerability: one tap's curves, and a map of layers and multipliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engine.files import replacing, require
from .slopes import Floats

# More lines of single items than this hide one another.
SHOWN_ITEMS = 50
# More rows than this have no room for a number each.
LABELLED_LAYERS = 24


class CurvePlot(NamedTuple):
    """Propensities at one tap at K multipliers."""

    title: str
    multipliers: Floats  # [K]
    items: Floats  # [N, K]
    mean: Floats  # [K]
    control: Floats  # [K]: mean with a random vector


class MapPlot(NamedTuple):
    """Mean propensities of n layers at one point at K multipliers."""

    point: str
    layers: list[int]  # n
    multipliers: Floats  # [K]
    means: Floats  # [n, K]
    reference: int  # index of the multiplier that is unsteered, or nearest to it
    best_row: int
    suggested_row: int | None


def write_png(curve: CurvePlot, layer_map: MapPlot, path: Path) -> None:
    """Draw both to `path`, or raise ValueError where matplotlib is missing.

    Left: propensity against the multiplier, items thin, their mean thick, the control's mean
    dashed. Right: mean propensity by layer and multiplier.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = min(9.0, 3.6 + 0.12 * len(layer_map.layers))
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_curves(curve, left)
    image = _draw_map(layer_map, right)
    figure.colorbar(image, ax=right, label="mean propensity")
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")


def check_picture(path: Path) -> None:
    """Raise ValueError if `path` ends as no picture does, or none can be drawn here."""
    if path.suffix != ".png":
        raise ValueError(f"{path}: curves and map are drawn as .png")
    require("matplotlib", "plot", str(path))


def _draw_curves(curve: CurvePlot, axes: Any) -> None:
    order = np.argsort(curve.multipliers)
    steps = curve.multipliers[order]
    # Evenly spread over the items, which may be sorted by something.
    n_items = len(curve.items)
    shown = np.unique(np.linspace(0, n_items - 1, min(SHOWN_ITEMS, n_items)).round()).astype(int)
    axes.plot(steps, curve.items[shown][:, order].T, color="grey", alpha=0.3, linewidth=0.7)
    axes.plot(steps, curve.mean[order], color="tab:blue", linewidth=2.5, label="mean over items")
    control = curve.control[order]
    axes.plot(steps, control, "--", color="black", linewidth=1.5, label="random vectors")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="multiplier", ylabel="propensity")
    axes.set_title(curve.title, fontsize="medium")
    axes.legend(fontsize="small")


def _draw_map(layer_map: MapPlot, axes: Any) -> Any:
    order, means = np.argsort(layer_map.multipliers), layer_map.means
    # White is the unsteered propensity, the same at every tap, or the nearest to unsteered.
    centre = float(means[:, layer_map.reference].mean())
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
    axes.set_xticks(range(len(order)), [f"{layer_map.multipliers[step]:g}" for step in order])
    n_layers = len(layer_map.layers)
    rows = range(0, n_layers, -(-n_layers // LABELLED_LAYERS))
    axes.set_yticks(rows, [str(layer_map.layers[row]) for row in rows])
    axes.set(xlabel="multiplier", ylabel="layer")
    title = f"{layer_map.point} (best layer framed"
    _frame(axes, layer_map.best_row, len(order), "-")
    if layer_map.suggested_row is not None:
        _frame(axes, layer_map.suggested_row, len(order), ":")
        title += ", suggested dotted"
    axes.set_title(f"{title})", fontsize="medium")
    return image


def _frame(axes: Any, row: int, width: int, line: str) -> None:
    """Mark a row of the map."""
    from matplotlib.patches import Rectangle

    frame = Rectangle((-0.5, row - 0.5), width, 1, fill=False, linestyle=line, linewidth=2)
    axes.add_patch(frame)
    frame.set_clip_on(False)  # of a row at the edge, half the line would be cut off

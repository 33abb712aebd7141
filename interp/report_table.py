"""A SteerabilityReport on a terminal: tables, a map of layers and multipliers, a few sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..model.points import Tap
from ..model.summary import counted
from .report import SteerabilityReport
from .slopes import Interval, Slope

if TYPE_CHECKING:  # imported where it is used: rich draws from Python's random numbers when it is
    from rich.table import Table
    from rich.text import Text

GREY, UP, DOWN = (120, 120, 120), (70, 130, 255), (240, 80, 60)


def curve_table(report: SteerabilityReport, tap_index: int) -> Table:
    """Mean propensity at each multiplier at one tap, its control beside it."""
    table = _table(_name(report.taps[tap_index]))
    for heading in ("multiplier", "mean propensity", "control"):
        table.add_column(heading, justify="right", no_wrap=True)
    curves = (report.curves[tap_index].tolist(), report.control_curves[tap_index].tolist())
    for multiplier, mean, control in zip(report.multipliers, *curves, strict=True):
        table.add_row(f"{multiplier:g}", f"{mean:+.3f}", f"{control:+.3f}")
    return table


def slopes_table(report: SteerabilityReport) -> Table:
    """One row per tap: its slope with its 95% interval, then the control's; the best is bold."""
    table = _table("slope of propensity against the multiplier (* best, > suggested)")
    table.add_column("", no_wrap=True)
    headings = ("layer", "point", "slope", "95%", "std", "neg.", "Spearman", "R²", "control", "95%")
    for heading in headings:
        is_text, is_span = heading == "point", heading == "95%"
        # Where it is narrow, intervals break in two, and no number is cut.
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_span)
    for index, tap in enumerate(report.taps):
        slope, control = report.slopes[index], report.control_slopes[index]
        is_best = index == report.best
        table.add_row(
            "*" * is_best + ">" * (tap == report.suggested),
            str(tap.layer),
            tap.point,
            f"{slope.mean:+.3f}",
            _span(slope.low, slope.high),
            _std(slope),
            f"{slope.negative_share:.0%}",
            f"{slope.spearman:+.2f}",
            f"{slope.r_squared:.2f}",
            f"{control.mean:+.3f}",
            _span(control.low, control.high),
            style="bold" if is_best else "",
        )
    return table


def layer_map(report: SteerabilityReport, point: str | None = None) -> Table:
    """How far each multiplier moves the mean propensity from the unsteered one, layer by layer.

    point: the best tap's unless another is named. Deeper layers come first. Where 0 is not among
    the multipliers, changes are from the one nearest to it. Raises ValueError for a point that was
    not steered.
    """
    point = report.taps[report.best].point if point is None else point
    indices = report.taps_of(point)
    if not indices:
        raise ValueError(f"nothing was steered at point {point}")
    curves = report.curves[indices]  # [layers, K]
    changes = curves - curves[:, [report.reference]]
    largest = float(abs(changes).max()) or 1.0
    start = report.multipliers[report.reference]
    table = _table(f"{point}: propensity change from multiplier {start:g}")
    table.add_column("multiplier", no_wrap=True, style="dim")
    for multiplier in report.multipliers:
        table.add_column(f"{multiplier:g}", justify="right", no_wrap=True)
    for row in reversed(range(len(indices))):
        cells = (_shaded(change, largest) for change in changes[row].tolist())
        table.add_row(f"layer {report.taps[indices[row]].layer}", *cells)
    return table


def summary_lines(report: SteerabilityReport) -> list[str]:
    """Plain sentences: the setting, how strong the effect is beside chance, and warnings."""
    lines = [_setting(report), _items(report), *_strength(report)]
    if report.suggested is not None:
        lines.append(_suggestion(report, report.suggested))
    return [*lines, *(f"warning: {warning}" for warning in report.warnings)]


def _setting(report: SteerabilityReport) -> str:
    unit = {
        "vector": "multiplier 1 adds the vector as it is",
        "resid_norm": "multiplier 1 adds a vector as long as the states there are on average",
    }[report.unit]
    source = f", vectors from {counted(report.n_train, 'pair')}" if report.n_train else ""
    return f"protocol {report.protocol}: {counted(report.n_items, 'item')}{source}; {unit}"


def _items(report: SteerabilityReport) -> str:
    line = (
        f"answers are scored at the token {report.form}; unsteered, the matching answer wins "
        f"in {report.baseline_accuracy:.0%} of the items"
    )
    if report.balance is not None:
        line += f"; it is listed first in {report.balance:.0%}"
    return line


def _strength(report: SteerabilityReport) -> list[str]:
    slope, control = report.slopes[report.best], report.control_slopes[report.best]
    name = _name(report.taps[report.best])
    where = f"best of {len(report.taps)} taps" if len(report.taps) > 1 else "steered"
    return [
        f"{where}: {name}, slope {_with_interval(_interval(slope))}; "
        f"standard deviation {_std(slope)}, {slope.negative_share:.0%} of the items negative, "
        f"Spearman {slope.spearman:+.2f}, R² {slope.r_squared:.2f}",
        f"random vectors of equal norm there: slope {_with_interval(_interval(control))}; "
        f"the vector's is larger by {_with_interval(report.differences[report.best])}",
    ]


def _suggestion(report: SteerabilityReport, suggested: Tap) -> str:
    rank = report.suggestion_rank()
    if rank is None:
        line = f"suggested: {_name(suggested)}, which was not steered"
    else:
        slope = report.slopes[report.taps.index(suggested)]
        line = (
            f"suggested: {_name(suggested)}, slope {slope.mean:+.3f}, "
            f"number {rank[0]} of {rank[1]} by slope at that point"
        )
    agreement = report.accessibility_spearman()
    if agreement is not None:
        line += f"; accessibility and slope over layers: Spearman {agreement:+.2f}"
    return line


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )


def _shaded(change: float, largest: float) -> Text:
    """A signed number, from grey to blue as it rises and to red as it falls."""
    from rich.text import Text

    share = abs(change) / largest
    towards = UP if change > 0 else DOWN
    mixed = (round(a + (b - a) * share) for a, b in zip(GREY, towards, strict=True))
    return Text(f"{change:+.2f}", style=f"rgb({','.join(map(str, mixed))})")


def _name(tap: Tap) -> str:
    return f"layer {tap.layer} {tap.point}"


def _interval(slope: Slope) -> Interval:
    return slope.mean, slope.low, slope.high


def _std(slope: Slope) -> str:
    return "-" if math.isnan(slope.std) else f"{slope.std:.3f}"


def _span(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"


def _with_interval(interval: Interval) -> str:
    mean, low, high = interval
    return f"{mean:+.3f} (95% interval {_span(low, high)})"

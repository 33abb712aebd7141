"""The results of an evaluation of steering vectors, and how far its numbers can be trusted."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.files import write_json
from ..engine.tap_names import listed
from ..engine.vector_checks import UNITS
from ..model.points import Tap
from ..model.summary import counted, named
from .intervals import Floats, doubts
from .propensity import PROTOCOLS
from .report_png import CurvePlot, MapPlot, check_picture, write_png
from .slopes import (
    Interval,
    Slope,
    difference_each,
    example_slopes,
    spearman,
    summarize_each,
)

FORMATS = (".json", ".png")
# Outside these, the measurement may be of something else than steerability.
BALANCED = (0.4, 0.6)
ROOM = (0.05, 0.95)


@dataclass(eq=False)  # arrays have no truth value to compare by
class SteerabilityReport:
    """P taps, each steered alone with the vector made for it, on N items at K multipliers.

    A propensity is how much the model prefers the answer that matches the behaviour to the other
    one, in nats (see `protocol`). Doubts that `checks` raises, and those about few items, are added
    to `warnings`. Raises ValueError where the parts do not fit together.
    """

    protocol: str  # one of PROTOCOLS
    multipliers: list[float]  # K
    taps: list[Tap]  # P
    propensities: Floats  # [P, N, K]
    control: Floats  # [P, N, K]: with random vectors of equal norm
    baseline_accuracy: float  # share of items with an unsteered propensity above 0
    balance: float | None  # share of items that list the matching answer first; None: unknown
    form: str  # the answer label's token as the tokenizer cut it; several joined by ", "
    n_train: int  # pairs the vectors were made from; 0: unknown
    unit: str  # one of UNITS: what multiplier 1 means
    accessibility: list[float] | None  # [n_layers]: the layer was suggested by it
    suggested: Tap | None
    warnings: list[str]
    seed: int = 0  # of the bootstrap
    item_keys: tuple[str, ...] = ()  # of the pairs, N of them or none

    def __repr__(self) -> str:
        sizes = counted(self.n_items, "item"), counted(len(self.multipliers), "multiplier")
        return named(self, self.protocol, listed(self.taps), *sizes)

    def __post_init__(self) -> None:
        self.multipliers = [float(multiplier) for multiplier in self.multipliers]
        self.taps = [Tap(*tap) for tap in self.taps]
        self.propensities = np.asarray(self.propensities, dtype=np.float64)
        self.control = np.asarray(self.control, dtype=np.float64)
        if self.accessibility is not None:
            self.accessibility = [float(value) for value in self.accessibility]
        self._check_parts()
        found = [*checks(self.balance, self.baseline_accuracy), *doubts(self.n_items)]
        new = [doubt for doubt in found if doubt not in self.warnings]
        self.warnings = [*self.warnings, *new]

    def _check_parts(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol {self.protocol!r} is not one of {', '.join(PROTOCOLS)}")
        if self.unit not in UNITS:
            raise ValueError(f"unit {self.unit!r} is not one of {', '.join(UNITS)}")
        if not self.taps or len(set(self.taps)) < len(self.taps):
            raise ValueError("a report needs at least 1 tap, and each only once")
        for name, values in (("propensities", self.propensities), ("control", self.control)):
            wanted = (len(self.taps), self.n_items, len(self.multipliers))
            if values.shape != wanted:
                raise ValueError(
                    f"{name} have shape {list(values.shape)}: {wanted[0]} taps, {wanted[1]} items "
                    f"and {wanted[2]} multipliers need {list(wanted)}"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"{name} hold numbers that are not finite")
        example_slopes(self.propensities, self.multipliers)  # refuses what has no slope
        for name in ("baseline_accuracy", "balance"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}: a share lies between 0 and 1")
        if self.accessibility is not None:
            if not np.isfinite(self.accessibility).all():
                raise ValueError("accessibility holds numbers that are not finite")
            deepest = max(tap.layer for tap in self.taps)
            if deepest >= len(self.accessibility):
                raise ValueError(
                    f"accessibility is given for {len(self.accessibility)} layers, "
                    f"but layer {deepest} was steered"
                )

    @property
    def n_items(self) -> int:
        return self.propensities.shape[1] if self.propensities.ndim == 3 else 0

    @cached_property
    def slopes(self) -> list[Slope]:
        """The slope of each tap, with its spread over items."""
        return summarize_each(self.propensities, self.multipliers, seed=self.seed)

    @cached_property
    def control_slopes(self) -> list[Slope]:
        """The slope of each tap under the random vectors."""
        return summarize_each(self.control, self.multipliers, seed=self.seed)

    @cached_property
    def differences(self) -> list[Interval]:
        """(mean, low, high) per tap: item by item, the slope above the control's."""
        return difference_each(self.propensities, self.control, self.multipliers, seed=self.seed)

    @cached_property
    def example_slopes(self) -> Floats:
        """The slope of each item at each tap, [P, N]."""
        return example_slopes(self.propensities, self.multipliers)

    @cached_property
    def curves(self) -> Floats:
        """Mean propensity over items, [P, K]."""
        return self.propensities.mean(axis=1)

    @cached_property
    def control_curves(self) -> Floats:
        """Mean propensity over items under the random vectors, [P, K]."""
        return self.control.mean(axis=1)

    @property
    def best(self) -> int:
        """Index of the tap with the largest mean slope, the first of equal ones."""
        return int(np.argmax([slope.mean for slope in self.slopes]))

    @property
    def reference(self) -> int:
        """Index of multiplier 0, the unsteered model, or of the one nearest to it."""
        return int(np.argmin(np.abs(self.multipliers)))

    def taps_of(self, point: str) -> list[int]:
        """Indices of the taps of a point, by layer."""
        found = [index for index, tap in enumerate(self.taps) if tap.point == point]
        return sorted(found, key=lambda index: self.taps[index].layer)

    def suggestion_rank(self) -> tuple[int, int] | None:
        """(rank by mean slope, of how many taps of its point) of the suggested tap; 1 is best.

        None without a suggestion, or if the suggested tap was not among those steered.
        """
        if self.suggested is None or self.suggested not in self.taps:
            return None
        slope = self.slopes[self.taps.index(self.suggested)].mean
        rivals = self.taps_of(self.suggested.point)
        return 1 + sum(self.slopes[index].mean > slope for index in rivals), len(rivals)

    def accessibility_spearman(self) -> float | None:
        """Rank correlation over layers of accessibility and mean slope, at the suggested point.

        None without either, or with fewer than 2 layers of that point.
        """
        if self.accessibility is None or self.suggested is None:
            return None
        same = self.taps_of(self.suggested.point)
        if len(same) < 2:
            return None
        accessibility = [self.accessibility[self.taps[index].layer] for index in same]
        return spearman(accessibility, [self.slopes[index].mean for index in same])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and finite numbers, for JSON; propensities are rounded to 1e-6 nats.

        None stands for the interval and the standard deviation of one item.
        """
        rank = self.suggestion_rank()
        return {
            "protocol": self.protocol,
            "multipliers": self.multipliers,
            "unit": self.unit,
            "n_items": self.n_items,
            "n_train": self.n_train,
            "form": self.form,
            "seed": self.seed,
            "balance": None if self.balance is None else float(self.balance),
            "baseline_accuracy": float(self.baseline_accuracy),
            "accessibility": self.accessibility,
            "accessibility_spearman": self.accessibility_spearman(),
            "suggested": None if self.suggested is None else self.suggested._asdict(),
            "suggestion_rank": rank and {"rank": rank[0], "of": rank[1]},
            "best": self.taps[self.best]._asdict(),
            "warnings": self.warnings,
            "item_keys": list(self.item_keys),
            "taps": [self._tap_dict(index) for index in range(len(self.taps))],
        }

    def _tap_dict(self, index: int) -> dict[str, Any]:
        mean, low, high = self.differences[index]
        return {
            **self.taps[index]._asdict(),
            "slope": _without_nan(dataclasses.asdict(self.slopes[index])),
            "control_slope": _without_nan(dataclasses.asdict(self.control_slopes[index])),
            "difference": _without_nan({"mean": mean, "low": low, "high": high}),
            "mean_curve": self.curves[index].tolist(),
            "control_mean_curve": self.control_curves[index].tolist(),
            "example_slopes": self.example_slopes[index].tolist(),
            "propensities": self.propensities[index].round(6).tolist(),  # [N][K]
        }

    def save(self, path: str | Path) -> None:
        """Write to .json or .png, by the ending, or nothing at all.

        Raises ValueError for another ending, a picture where matplotlib is missing, and a path that
        nothing can be written to; OSError where writing fails, as on a full disk.
        """
        path = Path(path)
        check_format(path)
        if path.suffix == ".png":
            write_png(self._curve_plot(), self._map_plot(), path)
        else:
            write_json(path, self.to_dict())

    def _curve_plot(self) -> CurvePlot:
        """The curves of the best tap."""
        best = self.best
        tap, slope = self.taps[best], self.slopes[best]
        return CurvePlot(
            title=f"layer {tap.layer} {tap.point}: slope {slope.mean:+.3f} "
            + ("" if math.isnan(slope.low) else f"(95% {slope.low:+.3f} to {slope.high:+.3f})"),
            multipliers=np.asarray(self.multipliers),
            items=self.propensities[best],
            mean=self.curves[best],
            control=self.control_curves[best],
        )

    def _map_plot(self) -> MapPlot:
        """The layers of the best tap's point."""
        point = self.taps[self.best].point
        indices = self.taps_of(point)
        shown = [self.taps[index] for index in indices]
        return MapPlot(
            point=point,
            layers=[tap.layer for tap in shown],
            multipliers=np.asarray(self.multipliers),
            means=self.curves[indices],
            reference=self.reference,
            best_row=indices.index(self.best),
            suggested_row=shown.index(self.suggested) if self.suggested in shown else None,
        )


def _without_nan(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(number) else number for name, number in numbers.items()}


def check_format(path: Path) -> None:
    """Raise ValueError if a report cannot be written to such a file here; cheap, to ask first."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: a report is written as {', '.join(FORMATS)}, by the ending")
    if path.suffix == ".png":
        check_picture(path)


def checks(balance: float | None, accuracy: float) -> list[str]:
    """Reasons why, on these items, the slopes say less than they seem to, one sentence each.

    balance: share of items that list the matching answer first. accuracy: share of items in which
    it wins unsteered.
    """
    found = []
    if balance is not None and not BALANCED[0] <= balance <= BALANCED[1]:
        found.append(
            f"the matching answer is listed first in {balance:.0%} of the items: "
            "a vector may steer the letter, not the behaviour"
        )
    if accuracy > ROOM[1]:
        found.append(
            f"unsteered, the matching answer wins in {accuracy:.0%} of the items: "
            "there is little left to steer towards (ceiling)"
        )
    if accuracy < ROOM[0]:
        found.append(
            f"unsteered, the matching answer wins in {accuracy:.0%} of the items: "
            "there is little left to steer away from (floor)"
        )
    return found

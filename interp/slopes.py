"""How strongly a vector steers: slopes of propensity against the multiplier, and their spread.

With propensities y[n, k] of N examples at K multipliers m[k]:

    example slope   b[n] = Σ_k (m[k] - mean m) · y[n, k] / Σ_k (m[k] - mean m)²
    mean curve      c[k] = mean over n of y[n, k]
    straight line   c[k] ≈ slope · m[k] + intercept, by least squares
    R²              share of the mean curve's variance that the line explains

Slopes of single examples, and the share of them that are negative ("anti-steerable"), are from Tan
et al. 2024 (steering-bench); least squares on the mean curve, with R², is the definition of arXiv
2604.06483. A least-squares slope is linear in the curve, so the mean of the b[n] is the slope of
the mean curve: one number serves both, and only the statistics of its spread differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .intervals import Floats, mean_intervals

Interval = tuple[float, float, float]  # mean, low, high; the last two are NaN for one example

MULTIPLIERS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Slope:
    """Steerability of one vector at one tap. Slopes are in propensity per multiplier."""

    mean: float  # of the examples' slopes; also the slope of the mean curve
    std: float  # of the examples' slopes (ddof = 1); NaN for one example
    low: float  # 95% interval of the mean: see intervals.py; NaN for one example
    high: float
    negative_share: float  # share of examples with a slope below 0: anti-steerable
    spearman: float  # of the mean curve and the multipliers; 0 where the curve is constant
    r_squared: float  # of the line through the mean curve; 0 where it is constant
    n_examples: int


def example_slopes(propensities: ArrayLike, multipliers: ArrayLike) -> Floats:
    """Least-squares slope of each row of `propensities` [N, K] against `multipliers` [K]: [N].

    The same as numpy.polyfit(multipliers, row, 1)[0]. For P vectors [P, N, K], [P, N].
    Raises ValueError for shapes that do not fit, no example, values that are not finite, or fewer
    than 2 different multipliers.
    """
    values, steps = _checked(propensities, multipliers, max(2, min(3, np.ndim(propensities))))
    return _slopes(values, steps)


def mean_curve_fit(propensities: ArrayLike, multipliers: ArrayLike) -> tuple[float, float, float]:
    """(slope, intercept, R²) of the line through the mean over examples of [N, K].

    The intercept is the line's propensity at multiplier 0. R² of a constant curve, of which
    there is nothing to explain, is 0. Raises ValueError as `example_slopes` does.
    """
    values, steps = _checked(propensities, multipliers, 2)
    curve = values.mean(axis=0)
    slope = float(_slopes(curve, steps))
    intercept = float(curve.mean() - slope * steps.mean())
    return slope, intercept, _r_squared(curve, steps)


def summarize(propensities: ArrayLike, multipliers: ArrayLike, *, seed: int = 0) -> Slope:
    """All statistics of one vector's slopes, from `propensities` [N, K] and `multipliers` [K].

    seed: of the resamples that intervals of many examples are from. Raises ValueError as
    `example_slopes` does.
    """
    values, steps = _checked(propensities, multipliers, 2)
    return summarize_each(values[None], steps, seed=seed)[0]


def summarize_each(
    propensities: ArrayLike, multipliers: ArrayLike, *, seed: int = 0
) -> list[Slope]:
    """`summarize` for each of P vectors [P, N, K] tried on the same examples.

    All are resampled by the same draws, which makes it much faster than P calls.
    """
    values, steps = _checked(propensities, multipliers, 3)
    slopes = _slopes(values, steps)  # [P, N]
    n_examples = slopes.shape[1]
    curves = values.mean(axis=1)  # [P, K]
    summaries = []
    for each, curve, (low, high) in zip(slopes, curves, mean_intervals(slopes, seed), strict=True):
        summaries.append(
            Slope(
                mean=float(each.mean()),
                std=float(each.std(ddof=1)) if n_examples > 1 else math.nan,
                low=float(low),
                high=float(high),
                negative_share=float((each < 0).mean()),
                spearman=spearman(curve, steps),
                r_squared=_r_squared(curve, steps),
                n_examples=n_examples,
            )
        )
    return summaries


def difference(
    propensities: ArrayLike, control: ArrayLike, multipliers: ArrayLike, *, seed: int = 0
) -> Interval:
    """(mean, low, high): how much larger each example's slope is than under the control.

    Both are [N, K] over the same examples, which are resampled as pairs: what an example does
    under any vector at all cancels. Raises ValueError as `example_slopes` does.
    """
    values, steps = _checked(propensities, multipliers, 2)
    others, _ = _checked(control, multipliers, 2)
    return difference_each(values[None], others[None], steps, seed=seed)[0]


def difference_each(
    propensities: ArrayLike, control: ArrayLike, multipliers: ArrayLike, *, seed: int = 0
) -> list[Interval]:
    """`difference` of each of P vectors [P, N, K] from the control beside it [P, N, K]."""
    values, steps = _checked(propensities, multipliers, 3)
    others, _ = _checked(control, multipliers, 3)
    if values.shape != others.shape:
        raise ValueError(
            f"propensities have shape {list(values.shape)}, "
            f"but those of the control {list(others.shape)}"
        )
    gains = _slopes(values, steps) - _slopes(others, steps)  # [P, N]
    return [
        (float(gain.mean()), float(low), float(high))
        for gain, (low, high) in zip(gains, mean_intervals(gains, seed), strict=True)
    ]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of two equally long lists: -1 to 1, and 0 where either is constant.

    Equal values share the average of their ranks. Raises ValueError for lists of different
    lengths, of fewer than 2 numbers, or with numbers that are not finite.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(
            "a rank correlation takes two equally long lists of at least 2 numbers, "
            f"not shapes {list(first.shape)} and {list(second.shape)}"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a rank correlation is given numbers that are not finite")
    x, y = (ranks - ranks.mean() for ranks in (_ranks(first), _ranks(second)))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(np.clip((x @ y) / scale, -1.0, 1.0)) if scale > 0 else 0.0


def _ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values get the mean of the ranks that they span."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _slopes(curves: Floats, multipliers: Floats) -> Floats:
    """Least-squares slopes of curves [..., K]."""
    centred = multipliers - multipliers.mean()
    # The start of a curve is subtracted first, so that a flat curve has slope 0 and no rounding
    # error, whose sign would count as anti-steerable.
    return np.asarray((curves - curves[..., :1]) @ centred / (centred @ centred))


def _r_squared(curve: Floats, multipliers: Floats) -> float:
    """The share of a curve's variance [K] that lies along its line."""
    if np.ptp(curve) == 0:  # tested before the mean, which may round, is subtracted
        return 0.0
    around, steps = curve - curve.mean(), multipliers - multipliers.mean()
    along = float(_slopes(curve, multipliers)) ** 2 * float(steps @ steps)
    return min(1.0, along / float(around @ around))


def _checked(propensities: ArrayLike, multipliers: ArrayLike, n_dims: int) -> tuple[Floats, Floats]:
    """Both as float64 arrays, [N, K] or [P, N, K] by `n_dims` and [K], or a ValueError."""
    values = np.asarray(propensities, dtype=np.float64)
    steps = np.asarray(multipliers, dtype=np.float64)
    if steps.ndim != 1 or not np.isfinite(steps).all():
        raise ValueError("multipliers must be a list of finite numbers")
    if len(np.unique(steps)) < 2:
        raise ValueError("a slope needs at least 2 different multipliers")
    if values.ndim != n_dims or values.shape[-1] != len(steps):
        wanted = ["vectors", "examples"][-(n_dims - 1) :]
        raise ValueError(
            f"propensities have shape {list(values.shape)}: with {len(steps)} multipliers it "
            f"must be [{', '.join(wanted)}, {len(steps)}]"
        )
    if values.shape[-2] == 0:
        raise ValueError("a slope needs at least 1 example")
    if not np.isfinite(values).all():
        raise ValueError("propensities hold numbers that are not finite")
    return values, steps

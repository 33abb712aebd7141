"""Intervals of means: how often they hold the true one, against scipy, and in bounded memory."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from tolerances import FLOAT64

from shardlens.interp import MULTIPLIERS, Slope, difference, summarize, summarize_each
from shardlens.interp.intervals import BOOTSTRAPPED, RESAMPLES, T_QUANTILES, Floats, mean_intervals

SAMPLES = 20_000
SEVERAL = [2, 3, 5, 10, 20, 40]


def slopes_of(values: Floats) -> list[Slope]:
    """Summaries of samples [S, N] of slopes."""
    return summarize_each(values[..., None] * np.array(MULTIPLIERS), MULTIPLIERS)


def coverage(draw: Callable[..., Floats], mean: float, n: int) -> float:
    """The share of SAMPLES samples of n values whose interval holds the mean they come from."""
    found = mean_intervals(draw(size=(SAMPLES, n)), seed=0)
    return float(np.mean((found[:, 0] <= mean) & (mean <= found[:, 1])))


@pytest.mark.parametrize("n", SEVERAL)
def test_a_few_gaussian_values_are_covered(n: int) -> None:
    """By 95% to within four standard errors, where percentiles of a bootstrap reach 50% to 94%."""
    assert abs(coverage(np.random.default_rng(n).normal, 0.0, n) - 0.95) < 0.0062


@pytest.mark.parametrize(
    ("n", "share"), [(2, 0.91), (3, 0.88), (5, 0.88), (10, 0.90), (20, 0.92), (40, 0.93)]
)
def test_a_few_skewed_values_are_covered_less(n: int, share: float) -> None:
    assert abs(coverage(np.random.default_rng(n).exponential, 1.0, n) - share) < 0.015


def test_the_table_is_that_of_t() -> None:
    wanted = stats.t.ppf(0.975, np.arange(1, BOOTSTRAPPED - 1))
    np.testing.assert_allclose(T_QUANTILES, wanted, atol=5.001e-6)


@pytest.mark.parametrize("n", [2, 8, BOOTSTRAPPED - 1])
def test_a_few_have_the_interval_of_t(n: int) -> None:
    values = np.random.default_rng(3).normal(0.7, 0.5, n)
    (found,) = slopes_of(values[None])
    wanted = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(wanted, abs=1e-5)
    (other,) = summarize_each(values[None, :, None] * [0, 1], [0, 1], seed=1)
    assert other.low == pytest.approx(found.low, abs=FLOAT64), "nothing is drawn"


@pytest.mark.parametrize("n", [BOOTSTRAPPED, 60])
def test_many_have_that_of_the_bootstrap(n: int) -> None:
    """Another seed's draws move an end of an interval by a few hundredths of its width."""
    values = np.random.default_rng(3).normal(0.7, 0.5, n)
    (found,) = slopes_of(values[None])
    other = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    near = 0.05 * (other.high - other.low)
    assert found.low == pytest.approx(other.low, abs=near)
    assert found.high == pytest.approx(other.high, abs=near)
    lines = values[:, None] * np.array(MULTIPLIERS)
    assert found == summarize(lines, MULTIPLIERS, seed=0)
    assert found.low != summarize(lines, MULTIPLIERS, seed=1).low


def test_many_values_are_covered() -> None:
    """300 samples of 60 values, which are gaussian around 0.7."""
    values = np.random.default_rng(4).normal(0.7, 0.5, (300, 60))
    found = slopes_of(values)
    covered = np.mean([slope.low <= 0.7 <= slope.high for slope in found])
    assert 0.90 <= covered <= 0.99
    # and no interval is wider than it must be: 2 · 1.96 standard errors
    widths = [slope.high - slope.low for slope in found]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(60), rel=0.05)


def test_one_value_has_no_interval() -> None:
    assert np.isnan(mean_intervals(np.ones((3, 1)), seed=0)).all()
    mean, low, high = difference([[0.0, 3.0]], [[0.0, 1.0]], [0, 1])
    assert mean == 2 and math.isnan(low) and math.isnan(high)


def test_resampling_many_values_takes_bounded_memory() -> None:
    """All draws together would take 400 MB."""
    values = np.random.default_rng(10).normal(0.7, 0.5, (1, 5_000))
    tracemalloc.start()
    ((low, high),) = mean_intervals(values, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert low < values.mean() < high

"""Slopes, fits and rank correlations against numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from tolerances import FLOAT64

from shardlens.interp import (
    MULTIPLIERS,
    difference,
    difference_each,
    example_slopes,
    mean_curve_fit,
    spearman,
    summarize,
    summarize_each,
)

Floats = NDArray[np.float64]
UNEVEN = (-2.0, -0.3, 0.1, 0.1, 5.0)


def made_up(seed: int, n: int, multipliers: tuple[float, ...] = MULTIPLIERS) -> Floats:
    """Lines of various slopes and levels, with noise and a bend: [n, K]."""
    generator = np.random.default_rng(seed)
    steps = np.array(multipliers)
    lines = generator.normal(0.7, 0.5, (n, 1)) * steps + generator.normal(0, 4, (n, 1))
    return np.asarray(lines + 0.1 * steps**2 + generator.normal(0, 0.3, lines.shape))


@pytest.mark.parametrize("multipliers", [MULTIPLIERS, UNEVEN, (0.0, 1.0)])
def test_example_slopes_are_those_of_polyfit(multipliers: tuple[float, ...]) -> None:
    values = made_up(0, 25, multipliers)
    wanted = [np.polyfit(multipliers, row, 1)[0] for row in values]
    np.testing.assert_allclose(example_slopes(values, multipliers), wanted, atol=FLOAT64)
    both = example_slopes(np.stack([values, -values]), multipliers)
    np.testing.assert_allclose(both, [wanted, [-slope for slope in wanted]], atol=FLOAT64)


@pytest.mark.parametrize("multipliers", [MULTIPLIERS, UNEVEN])
def test_mean_curve_fit_is_that_of_linregress(multipliers: tuple[float, ...]) -> None:
    values = made_up(1, 25, multipliers)
    wanted = stats.linregress(multipliers, values.mean(axis=0))
    found = mean_curve_fit(values, multipliers)
    expected = (wanted.slope, wanted.intercept, wanted.rvalue**2)
    np.testing.assert_allclose(found, expected, atol=FLOAT64)


def test_summary_is_its_parts() -> None:
    values = made_up(2, 40)
    slopes = example_slopes(values, MULTIPLIERS)
    curve = values.mean(axis=0)
    found = summarize(values, MULTIPLIERS)
    assert found.n_examples == 40
    assert found.mean == pytest.approx(mean_curve_fit(values, MULTIPLIERS)[0], abs=FLOAT64)
    assert found.std == pytest.approx(np.std(slopes, ddof=1), abs=FLOAT64)
    assert 0 < found.negative_share < 0.5
    assert found.negative_share == np.mean(slopes < 0)
    assert found.spearman == pytest.approx(stats.spearmanr(MULTIPLIERS, curve)[0], abs=FLOAT64)
    assert found.r_squared == pytest.approx(mean_curve_fit(values, MULTIPLIERS)[2], abs=FLOAT64)


def test_several_vectors_are_summarized_as_alone() -> None:
    values = np.stack([made_up(seed, 12) for seed in (5, 6, 7)])
    for each, rows in zip(summarize_each(values, MULTIPLIERS, seed=3), values, strict=True):
        alone = summarize(rows, MULTIPLIERS, seed=3)
        np.testing.assert_allclose(
            list(vars(each).values()), list(vars(alone).values()), atol=FLOAT64
        )
    paired = difference_each(values, values[::-1], MULTIPLIERS)
    wanted = difference(values[0], values[2], MULTIPLIERS)
    np.testing.assert_allclose(paired[0], wanted, atol=FLOAT64)
    np.testing.assert_allclose(paired[1], (0, 0, 0), atol=FLOAT64)


def test_difference_is_paired() -> None:
    """A gain of 0.2 on every example is sure, however much the examples themselves differ."""
    values, steps = made_up(8, 30), np.array(MULTIPLIERS)
    mean, low, high = difference(values + 0.2 * steps, values, MULTIPLIERS)
    np.testing.assert_allclose((mean, low, high), 0.2, atol=FLOAT64)
    alone = summarize(values, MULTIPLIERS)
    assert alone.high - alone.low > 0.1

    noise = np.random.default_rng(8).normal(0, 0.3, (30, 1)) * steps
    mean, low, high = difference(values + noise, values, MULTIPLIERS)
    gains = example_slopes(noise, MULTIPLIERS)
    assert mean == pytest.approx(gains.mean(), abs=FLOAT64)
    assert low < mean < high
    assert high - low == pytest.approx(4 * gains.std() / math.sqrt(30), rel=0.1)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 25]),
        ([1, 1, 2, 2, 3], [5, 4, 4, 4, 1]),
        ([-1.5, 0, 1.5], [3, 3, 4]),
    ],
)
def test_spearman_is_that_of_scipy(a: list[float], b: list[float]) -> None:
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=FLOAT64)


def test_flat_curves_have_no_direction() -> None:
    """Nor may rounding make up one: 0.1 is no exact number, and the mean of copies is rounded."""
    values = np.full((3, 7), 0.1) + np.arange(3)[:, None]
    found = summarize(values, MULTIPLIERS)
    assert (found.mean, found.std, found.low, found.high) == (0, 0, 0, 0)
    assert (found.negative_share, found.spearman, found.r_squared) == (0, 0, 0)
    assert spearman([1, 2, 3], [7, 7, 7]) == 0


def test_one_example_has_no_spread() -> None:
    found = summarize([[-1.0, 3.0]], [-1, 1])
    assert found.mean == 2
    assert all(math.isnan(value) for value in (found.low, found.high, found.std))
    assert (found.spearman, found.r_squared, found.n_examples) == (1, 1, 1)
    assert summarize([[3.0, -1.0]], [-1, 1]).negative_share == 1


@pytest.mark.parametrize(
    ("values", "multipliers", "message"),
    [
        ([[1.0, 2.0]], [1, 1], "at least 2 different multipliers"),
        ([[1.0]], [1], "at least 2 different multipliers"),
        ([[1.0, 2.0]], [[1, 2]], "list of finite numbers"),
        ([[1.0, 2.0]], [0, math.inf], "list of finite numbers"),
        ([[1.0, 2.0]], [0, 1, 2], r"shape \[1, 2\]: with 3 multipliers .* \[examples, 3\]"),
        ([1.0, 2.0], [0, 1], r"\[examples, 2\]"),
        (np.zeros((0, 2)), [0, 1], "at least 1 example"),
        ([[1.0, math.nan]], [0, 1], "not finite"),
    ],
)
def test_what_has_no_slope_is_refused(values: Floats, multipliers: list, message: str) -> None:
    for function in (example_slopes, mean_curve_fit, summarize):
        with pytest.raises(ValueError, match=message) as error:
            function(values, multipliers)
        assert "\n" not in str(error.value)


def test_mismatches_are_refused() -> None:
    with pytest.raises(ValueError, match="control"):
        difference(np.zeros((3, 7)), np.zeros((2, 7)), MULTIPLIERS)
    with pytest.raises(ValueError, match=r"\[vectors, examples, 7\]"):
        summarize_each(np.zeros((3, 7)), MULTIPLIERS)
    for a, b in (([1, 2], [1, 2, 3]), ([1], [1]), ([1, math.nan], [1, 2])):
        with pytest.raises(ValueError, match="rank correlation"):
            spearman(a, b)

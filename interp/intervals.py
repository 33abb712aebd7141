"""95% intervals of a mean: none for one value, Student's t for a few, the bootstrap for many.

With N values of mean m and standard deviation s (ddof = 1) the t interval is m ± t[N - 1] · s / √N.
It holds the true mean in 95% of samples at any N where values are gaussian. Where they are
exponential it does in 91% at N = 2, 88% at 3 and 5, 90% at 10, 92% at 20 and 93% at 40. Percentiles
of a bootstrap, which know nothing beyond the values drawn, do so less often: in 50% of gaussian
samples at N = 2, 75% at 3, 85% at 5, 90% at 10, 93% at 20, 94% at 50 (exponential: 46% to 93%).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
QUANTILES = (0.025, 0.975)  # a 95% interval
FEW = 10  # values below which an interval says little, whatever its kind
BOOTSTRAPPED = 50  # values from which percentiles of a bootstrap are wide enough
# Draws held in memory at once: 8 MiB, unless there are more values than that.
DRAWS = 1 << 20
# Student's t at 0.975 for 1 to BOOTSTRAPPED - 2 degrees of freedom. The one quantile that is needed
# is a table, so that no package of statistics has to be installed for it.
T_QUANTILES = (
    *(12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600),
    *(2.26216, 2.22814, 2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991),
    *(2.10982, 2.10092, 2.09302, 2.08596, 2.07961, 2.07387, 2.06866, 2.06390),
    *(2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227, 2.03951, 2.03693),
    *(2.03452, 2.03224, 2.03011, 2.02809, 2.02619, 2.02439, 2.02269, 2.02108),
    *(2.01954, 2.01808, 2.01669, 2.01537, 2.01410, 2.01290, 2.01174, 2.01063),
)


def mean_intervals(values: Floats, seed: int) -> Floats:
    """The intervals [S, 2] of the means of S rows of values [S, N]; NaN for rows of one value.

    seed: of the bootstrap, whose draws are the same for all rows.
    """
    n_values = values.shape[1]
    if n_values == 1:
        return np.full((len(values), 2), np.nan)
    if n_values < BOOTSTRAPPED:
        return _t_intervals(values)
    return _bootstrap_intervals(values, seed)


def doubts(n_values: int) -> list[str]:
    """A sentence about intervals of so few values; none where there are enough."""
    if n_values >= FEW:
        return []
    if n_values == 1:
        return [f"there is 1 item, and no interval: measure on {FEW} or more"]
    return [
        f"there are {n_values} items, and their intervals are right only if slopes of items are "
        f"about gaussian: measure on {FEW} or more"
    ]


def _t_intervals(values: Floats) -> Floats:
    n_values = values.shape[1]
    half = T_QUANTILES[n_values - 2] * values.std(axis=1, ddof=1) / np.sqrt(n_values)
    return np.asarray(values.mean(axis=1)[:, None] + half[:, None] * (-1, 1))


def _bootstrap_intervals(values: Floats, seed: int) -> Floats:
    """Percentiles of the means of resamples.

    A resample is kept as how often it draws each value, so that one product serves all rows.
    """
    n_rows, n_values = values.shape
    generator = np.random.default_rng(seed)
    centres = values.mean(axis=1, keepdims=True)
    moved = np.empty((n_rows, RESAMPLES))
    block = max(1, DRAWS // n_values)
    for start in range(0, RESAMPLES, block):
        n_draws = min(block, RESAMPLES - start)
        drawn = generator.integers(n_values, size=(n_draws, n_values))
        drawn += n_values * np.arange(n_draws)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=n_draws * n_values)
        weights = counts.reshape(n_draws, n_values).astype(np.float64) / n_values
        moved[:, start : start + n_draws] = (values - centres) @ weights.T
    return np.asarray(centres + np.quantile(moved, QUANTILES, axis=1).T)

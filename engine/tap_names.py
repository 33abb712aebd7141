"""Taps for people: their order, and how messages name them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from ..model.points import POINTS, Tap, check_point


def tap_order(tap: Tap, n_layers: int) -> tuple[int, int]:
    """A sort key: by layer, then in the order of POINTS. ValueError for a tap that is not there."""
    check_point(tap.point)
    if not 0 <= tap.layer < n_layers:
        raise ValueError(
            f"layer {tap.layer} does not exist: the model has layers 0 to {n_layers - 1}"
        )
    return tap.layer, POINTS.index(tap.point)


def tap_name(tap: Tap) -> str:
    """ "resid_post of layer 3" """
    layer, point = tap
    return f"{point} of layer {layer}"


def listed(taps: Iterable[Tap]) -> str:
    """Several taps, by point: "resid_post of layers 1-3, 5; mlp_out of layers 2"."""
    layers: dict[str, list[int]] = {}
    for layer, point in taps:
        layers.setdefault(point, []).append(layer)
    return "; ".join(f"{point} of layers {_ranges(numbers)}" for point, numbers in layers.items())


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 -> "1-3, 5"."""
    parts = []
    # consecutive numbers share their distance to a count
    counted = enumerate(sorted(numbers))
    for _, consecutive in itertools.groupby(counted, lambda pair: pair[1] - pair[0]):
        run = [number for _, number in consecutive]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(parts)

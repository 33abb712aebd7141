"""Conditions on a vector to steer with, and on the unit of its scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..model.arguments import choice, integer, is_integer
from ..model.config import ModelConfig
from ..model.fields import shown
from ..model.points import Tap

UNITS = ("vector", "resid_norm")
# the largest square of float32 is 1.8e19 squared; a state beside the edit has room
LONGEST_EDIT = 1e18
LARGEST_STATE = 1e6  # assumed where an edit takes a multiple of the state


def check_direction(vector: Tensor, name: str) -> None:
    """Raise ValueError, beginning with `name`, for a vector that is no direction to steer in."""
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {list(vector.shape)}: it needs one dim")
    if not vector.isfinite().all():
        raise ValueError(f"{name} is not finite")
    if not vector.any():
        raise ValueError(f"{name} is all zeros: it has no direction")


def check_move(length: float, name: str) -> None:
    """Raise ValueError, beginning with `name`, for an edit by more than norms can square.

    The state would be normed to zeros: finite numbers that mean nothing.
    """
    if not length <= LONGEST_EDIT:
        raise ValueError(
            f"{name}, can move states by {length:.3g}, more than the {LONGEST_EDIT:g} that a norm "
            "in float32 can square: choose a smaller scale"
        )


def check_width(subject: str, width: int, config: ModelConfig) -> None:
    """Raise ValueError for another width; it begins with `subject`, "the steering vectors have"."""
    if width != config.d:
        raise ValueError(f"{subject} {width} numbers, the states of this model {config.d}")


def check_unit(unit: str) -> None:
    """Raise ValueError for a unit that is none of UNITS."""
    choice(unit, "steering unit", UNITS)


def by_tap(values: Any, name: str) -> dict[Tap, Any]:
    """A mapping by tap, each of which is a (layer, point). Raises ValueError for anything else."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} are a {type(values).__name__}: give a dict by Tap(layer, point)")
    for tap in values:
        if not isinstance(tap, tuple) or len(tap) != 2 or not is_integer(tap[0]):
            raise ValueError(f"{name} are for {shown(tap)}: give a dict by Tap(layer, point)")
    return {
        Tap(integer(layer, "a layer"), point): value for (layer, point), value in values.items()
    }

"""Conditions on a vector to steer with, and on the unit of its scale."""

from __future__ import annotations

from torch import Tensor

from ..model.arguments import choice
from ..model.config import ModelConfig

UNITS = ("vector", "resid_norm")


def check_direction(vector: Tensor, name: str) -> None:
    """Raise ValueError, beginning with `name`, for a vector that is no direction to steer in."""
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {list(vector.shape)}: it needs one dim")
    if not vector.isfinite().all():
        raise ValueError(f"{name} is not finite")
    if not vector.any():
        raise ValueError(f"{name} is all zeros: it has no direction")


def check_width(subject: str, width: int, config: ModelConfig) -> None:
    """Raise ValueError for another width; it begins with `subject`, "the steering vectors have"."""
    if width != config.d:
        raise ValueError(f"{subject} {width} numbers, the states of this model {config.d}")


def check_unit(unit: str) -> None:
    """Raise ValueError for a unit that is none of UNITS."""
    choice(unit, "steering unit", UNITS)

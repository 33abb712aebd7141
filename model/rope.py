"""Rotary frequencies, with the scaling that a family's configs ask for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies [head_dim/2] float32, with the family's scaling.

    "llama3" (the Llama 3.1 release): wavelengths above original_context / low_freq_factor are
    stretched by `factor`, those below original_context / high_freq_factor are kept, and between
    them the two are mixed linearly in original_context / wavelength.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    scaling: RopeScaling = config.rope_scaling
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_context * inv_freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return inv_freq * (kept + (1 - kept) / scaling.factor)
    return inv_freq

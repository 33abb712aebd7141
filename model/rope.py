"""Rotary angles, with the scaling that a model's config asks for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.rope import rope_angles_reference
from .config import ModelConfig
from .rope_config import RopeScaling


class Rope:
    """Cosines and sines of absolute positions, as attention takes them."""

    def __init__(self, config: ModelConfig) -> None:
        self._scaling = config.rope_scaling
        self._base, self._dim = config.rope_theta, config.head_dim
        self._inv_freq = inverse_frequencies(config)

    def __call__(
        self, positions: Tensor, dtype: torch.dtype, *, n_tokens: int = 0
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, 1, head_dim/2] of positions [B, T].

        n_tokens: how many tokens are read at once; "dynamic" scaling depends on it.
        """
        self._inv_freq = self._inv_freq.to(positions.device)
        inv_freq = self._inv_freq
        if self._scaling.kind == "dynamic":
            inv_freq = self._dynamic(positions, n_tokens)
        cos, sin = rope_angles_reference(positions, inv_freq, torch.float32)
        scale = self._scaling.attention_factor
        return (cos * scale).to(dtype), (sin * scale).to(dtype)

    def _dynamic(self, positions: Tensor, n_tokens: int) -> Tensor:
        """NTK scaling by the length so far, [B, T, head_dim/2].

        That length is `n_tokens` for a text read at once, and position + 1 for each token after it:
        keys in the cache keep the frequencies that they were made with, as in transformers.
        """
        scaling, power = self._scaling, self._dim / (self._dim - 2)
        length = (positions + 1).clamp(min=max(n_tokens, scaling.original_context))
        grown = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
        # (base g^(D / (D - 2)))^(-2i / D) = base^(-2i / D) g^(-2i / (D - 2))
        exponents = torch.arange(0, self._dim, 2, device=positions.device).float() / self._dim
        return self._inv_freq * grown.float()[..., None] ** (-power * exponents)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies [head_dim/2] float32, with the family's scaling.

    "llama3" (the Llama 3.1 release): wavelengths above original_context / low are stretched by
    `factor`, those below original_context / high are kept, and between them the two are mixed
    linearly in original_context / wavelength. "yarn" (Peng et al., arXiv 2309.00071): mixed
    linearly in the dimension, between those that make `high` and `low` rotations in the original
    context. "dynamic" changes them only beyond the original context: see `Rope`.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    if scaling.kind == "factors":
        return inv_freq / torch.tensor(scaling.factors, dtype=torch.float32)
    if scaling.kind == "llama3":
        turns = scaling.original_context * inv_freq / (2 * math.pi)
        kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    elif scaling.kind == "yarn":
        kept = _yarn_kept(scaling, config.head_dim, config.rope_theta)
    else:
        return inv_freq
    return inv_freq * (kept + (1 - kept) / scaling.factor)


def _yarn_kept(scaling: RopeScaling, head_dim: int, base: float) -> Tensor:
    """The share of each frequency [head_dim/2] that YaRN keeps."""

    def dimension(rotations: float) -> float:
        turns = scaling.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(base))

    first, last = dimension(scaling.high), dimension(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    index = torch.arange(head_dim // 2, dtype=torch.float32)
    return 1 - ((index - first) / width).clamp(0, 1)

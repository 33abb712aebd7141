"""Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467).

    y = x / sqrt(mean(x²) + eps) * weight          x [..., d], weight [d]

The mean runs in float32; the normalised row is cast to x's dtype before the weight multiplies
it, which is the order the published LLaMA and Qwen weights were trained and served with.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] -> [..., d] in its dtype; float64 stays float64 inside."""
    x_wide = x if x.dtype == torch.float64 else x.float()
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)

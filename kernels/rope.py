"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout.

(a, b) -> (a cos - b sin, b cos + a sin)       a, b: first and second half of a head
angle[t, i] = position[t] * inv_freq[i]
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles_reference(
    positions: Tensor, inv_freq: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, head_dim/2] in `dtype`, computed in float32."""
    angles = positions[..., None].float() * inv_freq  # [B, T, head_dim/2]
    return angles.cos().to(dtype)[..., None, :], angles.sin().to(dtype)[..., None, :]


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of x [B, T, H, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

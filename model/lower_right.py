"""The mask of a chunk that ends where its text does, as a flag that fused attention knows.

A file of its own, imported when a chunk is read: PyTorch's module brings its compiler, which writes
a folder's name into the environment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.bias import CausalBias, CausalVariant


class LowerRight(CausalBias):
    """PyTorch's bias of that name, without its tensor of [2, T, S] numbers that nothing reads."""

    def __new__(cls, *sizes: Any) -> LowerRight:
        return torch.Tensor._make_subclass(cls, torch.empty(0))

    def __init__(self, n_tokens: int, span: int) -> None:
        super().__init__(CausalVariant.LOWER_RIGHT, n_tokens, span)

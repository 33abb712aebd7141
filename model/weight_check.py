"""Weights that are not finite, found when numbers computed from them are not."""

from __future__ import annotations

import torch
from torch import Tensor

from .sharding import tensor_table
from .transformer import Transformer

BLOCK_NUMBERS = 1 << 24  # looked at at once: the memory may be full of weights


def weight_not_finite(model: Transformer) -> str | None:
    """The first tensor, by its published name, of which this rank holds NaN or infinity."""
    parameters = dict(model.named_parameters())
    for name, parts in tensor_table(model.config).items():
        sizes = [tensor.spans(model.spans)[0].padded for tensor in parts]
        for tensor, part in zip(parts, parameters[name].detach().split(sizes), strict=True):
            if not _is_finite(part):
                return tensor.name
    return None


def _is_finite(weight: Tensor) -> bool:
    n_rows = max(1, BLOCK_NUMBERS // max(1, weight[0].numel())) if len(weight) else 1
    return all(bool(torch.isfinite(block).all()) for block in weight.split(n_rows))

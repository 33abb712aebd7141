"""Rounding of float32: correctly rounded roots and divisions, and the error of products.

Triton's `/` and `tl.sqrt` of float32 use the hardware's approximations, which err by up to two
units in the last place each. These are correctly rounded, as IEEE 754 asks; norms need a few of
them per row, which costs nothing beside the rest.
"""

from __future__ import annotations

import torch

from .triton_shim import tl, triton

# Columns of 16-bit numbers whose products a tensor core adds to the accumulator at a time,
# truncating the sum; of tf32, half as many.
TENSOR_CORE_COLUMNS = 16


@triton.jit
def inverse_rms(squares, d, eps):
    """1 / sqrt(squares / d + eps) of float32 sums of squares over d numbers."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, d * 1.0) + eps))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), float32."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


def tensor_core_slack(d: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """The error of sums of d products on tensor cores, as a share of the largest result.

    The accumulator is truncated, by half a unit in the last place on average, each time a few
    columns are added to it: d / 16 · eps / 2 in bf16 and fp16, biased towards 0. A product of any
    library that adds all its columns in one such chain loses as much.
    """
    columns = TENSOR_CORE_COLUMNS // (2 if dtype == torch.float32 else 1)
    return d / columns * torch.finfo(torch.float32).eps / 2

"""Square roots and divisions that are correctly rounded, as IEEE 754 asks.

Triton's `/` and `tl.sqrt` of float32 take the hardware's approximations, which err by up to two
units in the last place each. Norms take a few per row, beside which their cost is nothing.
"""

from __future__ import annotations

from .language import tl, triton


@triton.jit
def inverse_rms(squares, d, eps):
    """1 / sqrt(squares / d + eps) of float32 sums of squares over d numbers."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, d * 1.0) + eps))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), float32."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))

"""Gumbel noise that is a pure function of (seed, step, token id), for sampling without logits.

    argmax_i (z_i / T + G_i),  G_i = -log(-log U_i)       is a draw from softmax(z / T)

(the Gumbel-max trick). Because G depends on nothing but its key, each rank can make the noise of
its own slice of the vocabulary, and any split gives the same draw.

Random bits are Philox-4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as
1, 2, 3"), counter = (token id, step, 0, 0), key = the two halves of the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_shim import tl, triton

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_reference(counter: tuple[Tensor, Tensor], seed: Tensor) -> Tensor:
    """First output word of Philox-4x32-10, as int64 in [0, 2^32).

    counter: (c0, c1), int64 in [0, 2^32); seed int64; all broadcast together.
    """
    c0, c1 = counter
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # int64 products wrap modulo 2^64, so shift and mask recover the unsigned halves
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c0


def gumbel_reference(seed: Tensor, step: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32; seed, step, token_ids int64, broadcast together.

    U is taken as 1 - v with v on a grid of 2^-32, so the noise of likely samples (U near 1, v
    near 0) is finely resolved in float32; the largest value is 22.9.
    """
    seed, step, token_ids = torch.broadcast_tensors(seed, step, token_ids)
    bits = philox_reference((token_ids, step), seed)
    v = ((bits.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-v))


@triton.jit
def gumbel_kernel(seed, step, ids):
    """Noise [BB, BV] as in `gumbel_reference`: seed, step [BB] int64, ids [BV] int64."""
    zeros = tl.zeros([seed.shape[0], ids.shape[0]], tl.uint32)
    c0 = zeros + ids.to(tl.uint32)[None, :]
    c1 = zeros + step.to(tl.uint32)[:, None]
    low = zeros + (seed & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = zeros + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    bits, _, _, _ = tl.philox_impl(c0, c1, zeros, zeros, low, high)
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # -log1p(-v): by its series where log(1 - v) would lose v's digits
    series = v * 0 + 1 / 13
    for power in tl.static_range(12):
        series = series * v + 1 / (12 - power)
    t = tl.where(v < 0.25, v * series, -tl.log(1 - v))
    return -tl.log(t)

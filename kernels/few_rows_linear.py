"""A linear layer that reads its weight once, in place, for few rows on a CPU.

    y = x · Wᵀ + b                                x [..., K], W [N, K], b [N], y [..., N]

Few rows are bound by reading W: 4 · N · K bytes in float32. MKL, which multiplies float32 for
PyTorch on x86, reads it slower: its product with one row runs on one thread, and that with a few
rows copies W into another layout first. As a batch of products with PART rows of W each, every
thread has its own parts, which stay in its cache. Between 4 and 32 rows even those copies cost
more than the reading. oneDNN's 1 x 1 convolution copies nothing: to it the rows of W are N pixels
of K channels, already in the layout it wants, and the rows of x are a small kernel.

This only changes how the sum is formed: the reference is F.linear, and whatever is not a plain
product of few rows goes to it. The convolution adds its K products one after another, which
rounds as any float32 sum in that order does; MKL sums blocks, at half that error for K 1,024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import through_op
from .launch import rows_of

PART = 128  # rows of W: 0.5 MiB at K 1,024
# On two threads parts take 0.7 to 0.9 of the time at 128 rows, and no less at 256; on one thread
# the same as F.linear at 128. Below 1 MiB of W what counts is the number of operators.
MOST_ROWS = 128
LEAST_WEIGHTS = 2**18
HAS_MKL = torch.backends.mkl.is_available()
# On two threads convolutions of 16 rows take 0.6 of the time of parts, of 32 rows 0.85. Below 16
# MiB of W or above 2,048 columns, which oneDNN sums in several passes, they win little or lose.
CONVOLVED_ROWS = range(4, 33)
CONVOLVED_LEAST_WEIGHTS, CONVOLVED_MOST_COLUMNS = 2**22, 2048
ROWS_AT_ONCE = 8  # of x, in a vector register: zeros beside other rows are no slower than none
HAS_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N], contiguous; as F.linear up to rounding."""
    if not _parts_pay(x, weight, bias):
        return _plain(x, weight, bias)
    rows = rows_of(x)
    y = (_convolved if _convolution_pays(rows, weight) else _in_parts)(rows, weight)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], weight.shape[0])


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear; few float32 rows on a CPU each get the bits that they get among any others.

    MKL multiplies rows that do not fill a block of its own with other code, which rounds otherwise,
    and a request should depend neither on its slot nor on how many run beside it. So rows are
    padded to whole blocks. One row of a large weight is left alone: it would take twice as long.
    """
    n_rows = x.numel() // x.shape[-1]
    is_whole = n_rows % ROWS_AT_ONCE == 0 or n_rows > MOST_ROWS
    if is_whole or (n_rows == 1 and weight.numel() >= LEAST_WEIGHTS):
        return F.linear(x, weight, bias)
    if not (x.is_cpu and x.dtype == torch.float32) or through_op(x, weight, bias):
        return F.linear(x, weight, bias)
    y = F.linear(_whole_blocks(rows_of(x)), weight, bias)[:n_rows]
    return y.view(*x.shape[:-1], weight.shape[0])


def _whole_blocks(rows: Tensor) -> Tensor:
    """Rows [M, K] with zero rows below, up to a multiple of ROWS_AT_ONCE."""
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % ROWS_AT_ONCE))


def _parts_pay(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        HAS_MKL
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and weight.numel() >= LEAST_WEIGHTS
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and weight.shape[0] >= PART
        and weight.stride(-1) == 1
        and (bias is None or bias.dtype == torch.float32)
        and not through_op(x, weight, bias)
    )


def _in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K], weight [N, K] -> [M, N]. Views are made at once: a decode step makes hundreds."""
    n_given = x.shape[0]
    if n_given > 1:  # see `_plain`
        x = _whole_blocks(x)
    (n_rows, width), row_stride = x.shape, weight.stride(0)
    n_parts, rest = divmod(weight.shape[0], PART)
    parts = weight.as_strided((n_parts, width, PART), (PART * row_stride, 1, row_stride))
    repeated = x.as_strided((n_parts, n_rows, width), (0, x.stride(0), 1))
    products = torch.bmm(repeated, parts)  # [n, M, PART]
    cut = n_parts * PART
    y = products.view(1, cut) if n_rows == 1 else products.transpose(0, 1).reshape(n_rows, cut)
    y = torch.cat((y, x @ weight[cut:].T), -1) if rest else y
    return y[:n_given]


def _convolution_pays(x: Tensor, weight: Tensor) -> bool:
    return (
        HAS_ONEDNN
        and x.shape[0] in CONVOLVED_ROWS
        and weight.shape[1] <= CONVOLVED_MOST_COLUMNS
        and weight.numel() >= CONVOLVED_LEAST_WEIGHTS
        and weight.is_contiguous()
    )


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K], weight [N, K] -> [M, N]."""
    (n_rows, k), n = x.shape, weight.shape[0]
    x = _whole_blocks(x).contiguous()
    pixels = weight.as_strided((1, k, n, 1), (n * k, 1, k, k))  # channels last
    kernel = x.as_strided((x.shape[0], k, 1, 1), (k, 1, k, k))
    y = F.conv2d(pixels, kernel)  # [1, padded M, N, 1]
    return y[0, :n_rows, :, 0].contiguous()

"""Gradients of `rmsnorm_steer`.

    n = h · rstd,  dn = E₂'(dy),  c = w · dn         E₁', E₂': gradients of the edits
    dw = Σ_rows dn · n
    dx = dresidual = E₁'(dh + rstd · (c - n · mean(c n)))

The norm's own gradient is one pass: reads h, dy, dh, writes dx, each program summing dw over the
rows it walks. Edits are separate passes before and after it (see `edits_backward.py`), with
float32 between: held in one kernel with the norm, wide rows do not fit the registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton
from .edits import Edits
from .edits_backward import edit_backward
from .launch import block_and_warps, chip_of, launch, rows_of, wide
from .rounding import inverse_rms
from .triton_shim import tl, triton

# Programs per processor; each keeps a separate sum of dw.
PROGRAMS = 4
# Columns held in registers at once; wider rows are walked in parts, twice, and their sum of dw lies
# in memory.
MOST_COLUMNS = 8192
# Without maxnreg, ptxas aims lower, for more programs at once, and spills.
MOST_REGISTERS = 128


def rmsnorm_backward_reference(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """dy, dh, h [R, d], weight [d] -> (gradient to h [R, d], to weight [d]), both wide."""
    state, grad = wide(h), wide(dy)
    rstd = torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + eps)
    normed = state * rstd
    c = wide(weight) * grad
    d_state = rstd * (c - normed * (c * normed).mean(-1, keepdim=True))
    d_state = d_state if dh is None else d_state + dh
    return d_state, (grad * normed.to(h.dtype)).sum(0)


@triton.jit
def _rmsnorm_backward_kernel(
    dy, dh, h, weight,  # [R, d]; dy, dh contiguous
    dx,  # [R, d] contiguous
    dw,  # [programs, d] float32
    n_rows, d, eps, h_stride,
    HAS_DH: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    HOLD_DW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = h.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if HOLD_DW:
        dw_sum = tl.zeros([BLOCK], tl.float32)
    for step in range(0, tl.cdiv(n_rows - program, programs)):
        row = program + step * programs
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, d, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < d
            state = tl.load(h + row * h_stride + column, mask=inside, other=0).to(tl.float32)
            c = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
            c *= tl.load(dy + row * d + column, mask=inside, other=0).to(tl.float32)
            squares, products = squares + state * state, products + c * state
        rstd = inverse_rms(tl.sum(squares, 0), d, eps)
        mean = tl.div_rn(tl.sum(products, 0) * rstd, d * 1.0)
        for start in range(0, d, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < d
            normed = tl.load(h + row * h_stride + column, mask=inside, other=0)
            normed = normed.to(tl.float32) * rstd
            grad = tl.load(dy + row * d + column, mask=inside, other=0).to(tl.float32)
            if WANT_WEIGHT:
                row_dw = grad * normed.to(dtype).to(tl.float32)
                if HOLD_DW:
                    dw_sum += row_dw
                else:
                    program_dw = dw + program * d + column
                    so_far = tl.load(program_dw, mask=inside & (step > 0), other=0)
                    tl.store(program_dw, so_far + row_dw, mask=inside)
            grad *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)
            grad = rstd * (grad - normed * mean)
            if HAS_DH:
                grad += tl.load(dh + row * d + column, mask=inside, other=0).to(tl.float32)
            tl.store(dx + row * d + column, grad.to(dx.dtype.element_ty), mask=inside)
    if WANT_WEIGHT and HOLD_DW:
        column = tl.arange(0, BLOCK)
        tl.store(dw + program * d + column, dw_sum, mask=column < d)


def rmsnorm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient to h [R, d] in out_dtype, gradient to weight [d]); dy, dh, h [R, d]."""
    if not use_triton(h):
        dx, dw = rmsnorm_backward_reference(dy, dh, h, weight, eps)
        return dx.to(out_dtype), dw.to(weight.dtype)
    n_rows, d = h.shape
    programs = min(n_rows, PROGRAMS * chip_of(h.device).processors)
    dx = torch.empty(h.shape, dtype=out_dtype, device=h.device)
    dw_parts = torch.empty(programs if want_weight else 0, d, dtype=torch.float32, device=h.device)
    launch(
        _rmsnorm_backward_kernel,
        (programs,),
        dy, dh, h, weight.contiguous(), dx, dw_parts, n_rows, d, eps, h.stride(0),
        HAS_DH=dh is not None, WANT_WEIGHT=want_weight, HOLD_DW=d <= MOST_COLUMNS,
        maxnreg=MOST_REGISTERS, **block_and_warps(min(d, MOST_COLUMNS), 16),
    )  # fmt: skip
    return dx, dw_parts.sum(0).to(weight.dtype)


def rmsnorm_steer_backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    h: Tensor,
    y_before: Tensor | None,
    weight: Tensor,
    eps: float,
    before: Edits | None,
    after: Edits | None,
    want_weight: bool,
    want_vectors: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(dx, dw, (d_vectors, d_scale) of E₁, the same of E₂), tensors as `rmsnorm_steer` has them.

    h is its second result, y_before its first without E₂ (needed only where E₂ is given). The
    tables of an edit that is not given are empty.
    """
    d = x.shape[-1]
    # autograd may hand over expanded gradients, whose rows share memory
    grad = dy.contiguous().view(-1, d)
    dh = None if dh is None else dh.contiguous().view(-1, d)
    of_1, of_2 = _no_table(x), _no_table(x)
    between = torch.float64 if x.dtype == torch.float64 else torch.float32
    if after is not None:
        assert y_before is not None
        grad, *tables = edit_backward(rows_of(y_before), grad, after, between, want_vectors)
        of_2 = (tables[0], tables[1])
    out_dtype = x.dtype if before is None else between
    grad, dw = rmsnorm_backward(grad, dh, rows_of(h), weight, eps, out_dtype, want_weight)
    if before is not None:
        a = rows_of(x if residual is None else x + residual)
        grad, *tables = edit_backward(a, grad, before, x.dtype, want_vectors)
        of_1 = (tables[0], tables[1])
    return grad.view(x.shape), dw, of_1, of_2


def _no_table(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)

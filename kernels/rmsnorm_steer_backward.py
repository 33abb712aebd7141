"""Gradients of `rmsnorm_steer`, in one pass over the row.

    n = h · rstd,  dn = E₂'(dy),  c = w · dn         E₁', E₂': gradients of the edits, `edits.py`
    dw = Σ_rows dn · n
    dx = dresidual = E₁'(dh + rstd · (c - n · mean(c n)))

h is made again from x and residual where E₁ is there, and is what was saved otherwise. Reads h,
dy, dh, writes dx. Each program walks several rows and sums dw on its way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .edits import (
    Edits,
    edit_gradient_reference,
    edit_reference,
    edit_row,
    edit_row_gradient,
    load_edit,
    table_arguments,
    table_row,
    wide,
)
from .language import tl, triton
from .launch import block_and_warps, chip_of, launch, rows_of
from .switch import use_triton

# Programs per processor; each has a sum of dw of its own.
PROGRAMS = 4


def rmsnorm_steer_backward_reference(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    before: Edits | None,
    after: Edits | None,
) -> tuple[Tensor, ...]:
    """(dx [R, d], dw [d], dv₁ [R, d], ds₁ [R], dv₂ [R, d], ds₂ [R]), the dv and ds wide.

    dv, ds of an edit that is not there are empty.
    """
    a = x if residual is None else x + residual
    state = a if before is None else edit_reference(a, before)
    h, w, grad = wide(state), wide(weight), wide(dy)
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    normed = h * rstd
    none = grad.new_empty(0)
    ds_1 = dv_1 = ds_2 = dv_2 = none
    if after is not None:
        out = (weight * normed.to(x.dtype)).to(x.dtype)
        grad, ds_2, dv_2 = edit_gradient_reference(wide(out), grad, after)
    dw = (grad * normed.to(x.dtype)).sum(0)
    c = w * grad
    grad = rstd * (c - normed * (c * normed).mean(-1, keepdim=True))
    if dh is not None:
        grad = grad + dh
    if before is not None:
        grad, ds_1, dv_1 = edit_gradient_reference(wide(a), grad, before)
    return grad.to(x.dtype), dw.to(weight.dtype), dv_1, ds_1, dv_2, ds_2


@triton.jit
def _rmsnorm_steer_backward_kernel(
    dy, dh,  # [R, d] contiguous
    x, residual, weight,
    dx,  # [R, d] contiguous
    dw,  # [programs, d] float32
    vectors_1, modes_1, index_1, scale_1, dv_1, ds_1,  # dv: [R, d], ds: [R], float32
    vectors_2, modes_2, index_2, scale_2, dv_2, ds_2,
    n_rows, d, n_1, n_2, eps,
    x_stride, residual_stride, stride_1, stride_2,
    RESIDUAL: tl.constexpr, HAS_DH: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    WANT_WEIGHT: tl.constexpr, WANT_VECTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < d
    dtype = x.dtype.element_ty
    w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    dw_sum = tl.zeros([BLOCK], tl.float32)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for step in range(0, tl.cdiv(n_rows - program, programs)):
        row = program + step * programs
        a = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
        if RESIDUAL:
            added = tl.load(residual + row * residual_stride + column, mask=inside, other=0)
            a = (a + added.to(tl.float32)).to(dtype).to(tl.float32)
        state = a
        if BEFORE:
            at_1 = table_row(index_1, row, n_1)
            if at_1 >= 0:
                v, mode, s = load_edit(
                    vectors_1, modes_1, scale_1, at_1, row, stride_1, column, inside
                )
                state = edit_row(a, v, mode, s).to(dtype).to(tl.float32)
        rstd = 1 / tl.sqrt(tl.sum(state * state, 0) / d + eps)
        grad = tl.load(dy + row * d + column, mask=inside, other=0).to(tl.float32)
        if AFTER:
            at = table_row(index_2, row, n_2)
            ds = 0.0
            dv = tl.zeros([BLOCK], tl.float32)
            if at >= 0:
                v, mode, s = load_edit(
                    vectors_2, modes_2, scale_2, at, row, stride_2, column, inside
                )
                out = ((state * rstd).to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
                grad, ds, dv = edit_row_gradient(out, v, grad, mode, s)
            tl.store(ds_2 + row, ds)
            if WANT_VECTORS:
                tl.store(dv_2 + row * d + column, dv, mask=inside)
        normed = state * rstd
        if WANT_WEIGHT:
            dw_sum += grad * normed.to(dtype).to(tl.float32)
        c = w * grad
        grad = rstd * (c - normed * (tl.sum(c * normed, 0) / d))
        if HAS_DH:
            grad += tl.load(dh + row * d + column, mask=inside, other=0).to(tl.float32)
        if BEFORE:
            ds = 0.0
            dv = tl.zeros([BLOCK], tl.float32)
            if at_1 >= 0:
                v, mode, s = load_edit(
                    vectors_1, modes_1, scale_1, at_1, row, stride_1, column, inside
                )
                grad, ds, dv = edit_row_gradient(a, v, grad, mode, s)
            tl.store(ds_1 + row, ds)
            if WANT_VECTORS:
                tl.store(dv_1 + row * d + column, dv, mask=inside)
        tl.store(dx + row * d + column, grad.to(dtype), mask=inside)
    if WANT_WEIGHT:
        tl.store(dw + tl.program_id(0).to(tl.int64) * d + column, dw_sum, mask=inside)


def rmsnorm_steer_backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    before: Edits | None,
    after: Edits | None,
    want_weight: bool,
    want_vectors: bool,
) -> tuple[Tensor, ...]:
    """As `rmsnorm_steer_backward_reference`, without what is not wanted."""
    rows, d = rows_of(x), x.shape[-1]
    added = None if residual is None else rows_of(residual)
    # autograd may hand over expanded gradients, whose rows share memory
    dy_rows = dy.contiguous().view(-1, d)
    dh_rows = None if dh is None else dh.contiguous().view(-1, d)
    if not use_triton(x):
        return rmsnorm_steer_backward_reference(
            dy_rows, dh_rows, rows, added, weight, eps, before, after
        )
    n_rows = rows.shape[0]
    programs = min(n_rows, PROGRAMS * chip_of(x.device).processors)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def outputs(edits: Edits | None) -> tuple[Tensor, Tensor]:
        wanted = edits is not None
        dv = floats(n_rows, d) if wanted and want_vectors else floats(0)
        return dv, floats(n_rows if wanted else 0)

    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    dw = floats(programs if want_weight else 0, d)
    dv_1, ds_1 = outputs(before)
    dv_2, ds_2 = outputs(after)
    table_1, n_1, stride_1 = table_arguments(before)
    table_2, n_2, stride_2 = table_arguments(after)
    launch(
        _rmsnorm_steer_backward_kernel,
        (programs,),
        dy_rows, dh_rows, rows, added, weight.contiguous(), dx, dw,
        *table_1, dv_1, ds_1, *table_2, dv_2, ds_2,
        n_rows, d, n_1, n_2, eps,
        rows.stride(0), 0 if added is None else added.stride(0), stride_1, stride_2,
        RESIDUAL=added is not None, HAS_DH=dh is not None, BEFORE=before is not None,
        AFTER=after is not None, WANT_WEIGHT=want_weight, WANT_VECTORS=want_vectors,
        **block_and_warps(d, 32),
    )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype), dv_1, ds_1, dv_2, ds_2

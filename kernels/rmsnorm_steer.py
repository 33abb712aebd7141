"""Residual add, edit, RMSNorm and edit again, in one pass over the row.

    h = E₁(x + residual)
    y = E₂(h · rstd · w),  rstd = 1 / sqrt(mean(h²) + eps)       x, residual, h, y [R, d]; w [d]

E₁, E₂ are edits, see `edits.py`; the norm is that of Zhang & Sennrich, arXiv 1910.07467. Rounding
is that of the published models: x + residual, E₁, the normalised row, its product with w, and E₂
are each rounded to x's dtype; between roundings all is float32. Moved: x, residual, y, h once each
(without residual and E₁, h is x and is not written), which bounds the speed.

Gradients: `rmsnorm_steer_backward.py`. The number of warps follows from d alone, never from a
timing: norms are computed on every rank, and their sums must round alike on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import needs_gradient, through_op, use_triton
from .edits import Edits, edit_reference, edit_row, load_edit, table_arguments, table_row
from .launch import block_and_warps, launch, rows_of, wide
from .rmsnorm_steer_backward import rmsnorm_steer_backward
from .rounding import inverse_rms
from .triton_shim import tl, triton

MOST_COLUMNS = 16384


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] -> [..., d] in its dtype; float64 stays float64 inside."""
    if x.dtype == weight.dtype == torch.float32 and x.is_cpu:  # without casts: one operator
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    state = wide(x)
    normed = state * torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def rmsnorm_steer_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    before: Edits | None = None,
    after: Edits | None = None,
) -> tuple[Tensor, Tensor]:
    """x, residual [R, d], weight [d] -> (y, h) [R, d]. Differentiable by autograd."""
    h = x if residual is None else x + residual
    h = h if before is None else edit_reference(h, before)
    y = rmsnorm_reference(h, weight, eps)
    return (y if after is None else edit_reference(y, after)), h


@triton.jit
def _rmsnorm_steer_kernel(
    x,  # [R, d]
    residual,  # [R, d]
    weight,  # [d]
    y,  # [R, d] contiguous
    h,  # [R, d]
    vectors_1, modes_1, index_1, scale_1,  # E₁
    vectors_2, modes_2, index_2, scale_2,  # E₂
    d, n_1, n_2, eps,
    x_stride, residual_stride, h_stride, stride_1, stride_2,
    RESIDUAL: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    WRITE_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < d
    dtype = x.dtype.element_ty
    state = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(residual + row * residual_stride + column, mask=inside, other=0)
        state = (state + added.to(tl.float32)).to(dtype).to(tl.float32)
    if BEFORE:
        edit = table_row(index_1, row, n_1)
        if edit >= 0:
            v, mode, s = load_edit(vectors_1, modes_1, scale_1, edit, row, stride_1, column, inside)
            state = edit_row(state, v, mode, s).to(dtype).to(tl.float32)
    if WRITE_H:
        tl.store(h + row * h_stride + column, state.to(dtype), mask=inside)
    rstd = inverse_rms(tl.sum(state * state, 0), d, eps)
    w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    out = (state * rstd).to(dtype).to(tl.float32) * w
    if AFTER:
        edit = table_row(index_2, row, n_2)
        if edit >= 0:
            v, mode, s = load_edit(vectors_2, modes_2, scale_2, edit, row, stride_2, column, inside)
            out = edit_row(out.to(dtype).to(tl.float32), v, mode, s)
    tl.store(y + row * d + column, out.to(dtype), mask=inside)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    before: Edits | None,
    after: Edits | None,
    h: Tensor | None,
) -> Tensor:
    """y, shaped like x [..., d]; the state is written to `h` [..., d] where one is given."""
    rows, d = rows_of(x), x.shape[-1]
    added = None if residual is None else rows_of(residual)
    target = None if h is None else h.view(-1, d)
    if not use_triton(x):
        flat_y, state = rmsnorm_steer_reference(
            rows, weight, eps, residual=added, before=before, after=after
        )
        if target is not None:
            target.copy_(state)
        return flat_y.view(x.shape)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    table_1, n_1, stride_1 = table_arguments(before)
    table_2, n_2, stride_2 = table_arguments(after)
    launch(
        _rmsnorm_steer_kernel,
        (rows.shape[0],),
        rows, added, weight.contiguous(), y, target, *table_1, *table_2,
        d, n_1, n_2, eps,
        rows.stride(0), 0 if added is None else added.stride(0),
        0 if target is None else target.stride(0), stride_1, stride_2,
        RESIDUAL=added is not None, BEFORE=before is not None, AFTER=after is not None,
        WRITE_H=target is not None,
        **block_and_warps(d, 16),
    )  # fmt: skip
    return y


# The registered ops take an edit as a list of its four tensors, empty for none.
def _flat(edits: Edits | None) -> list[Tensor]:
    return [] if edits is None else [edits.vectors, edits.modes, edits.index, edits.scale]


def _edits(flat: Sequence[Tensor]) -> Edits | None:
    return Edits(*flat) if flat else None


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _new_state(x: Tensor, residual: Tensor | None, before: Sequence[Tensor]) -> Tensor | None:
    """Memory for h, None where h is x."""
    return _like(x) if residual is not None or before else None


@torch.library.custom_op("shardlens::rmsnorm_steer", mutates_args=())
def _op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    h = _new_state(x, residual, before)
    y = _forward(x, residual, weight, eps, _edits(before), _edits(after), h)
    return y, x.new_empty(0) if h is None else h  # an op may not return its input


@_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    h = _new_state(x, residual, before)
    return _like(x), x.new_empty(0) if h is None else h


@torch.library.custom_op("shardlens::rmsnorm_steer_into", mutates_args=("h",))
def _into_op(
    h: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> Tensor:
    return _forward(x, residual, weight, eps, _edits(before), _edits(after), h)


@_into_op.register_fake
def _(h: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _like(x)


@torch.library.custom_op("shardlens::rmsnorm_steer_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    h: Tensor,
    weight: Tensor,
    eps: float,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    want_weight: bool,
    want_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y_before = _forward(h, None, weight, eps, None, None, None) if after else None
    dx, dw, of_1, of_2 = rmsnorm_steer_backward(
        dy, dh, x, residual, h, y_before, weight, eps, _edits(before), _edits(after),
        want_weight, want_vectors,
    )  # fmt: skip
    return dx, dw, *of_1, *of_2


@_backward_op.register_fake
def _(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    h: Tensor,
    weight: Tensor,
    eps: float,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    want_weight: bool,
    want_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tables = [
        _like(given[index]) if given else x.new_empty(0, dtype=torch.float32)
        for given in (before, after)
        for index in (0, 3)
    ]
    return _like(x), _like(weight), tables[0], tables[1], tables[2], tables[3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps, before, after = inputs
    ctx.has_h, ctx.n_before = output[1].shape == output[0].shape, len(before)
    h = output[1] if ctx.has_h else x
    # only the gradient of E₁ needs x and the residual
    sources = (x, residual) if before else (h, None)
    ctx.save_for_backward(*sources, h, weight, *before, *after)


def _gradient(ctx: Any, dy: Tensor, dh: Tensor | None) -> tuple[Any, ...]:
    x, residual, h, weight, *tables = ctx.saved_tensors
    before, after = tables[: ctx.n_before], tables[ctx.n_before :]
    need_x, need_residual, need_weight, _, need_before, need_after = ctx.needs_input_grad
    dx, dw, dv_1, ds_1, dv_2, ds_2 = torch.ops.shardlens.rmsnorm_steer_backward(
        dy, dh if ctx.has_h else None, x, residual, h, weight, ctx.eps, before, after,
        need_weight, any(needs[0] for needs in (need_before, need_after) if needs),
    )  # fmt: skip

    def of_table(given: list[Tensor], dv: Tensor, ds: Tensor) -> list[Tensor | None]:
        return [dv, None, None, ds] if given else []

    return (
        dx if need_x else None,
        dx if need_residual else None,
        dw if need_weight else None,
        None,
        of_table(before, dv_1, ds_1),
        of_table(after, dv_2, ds_2),
    )


_op.register_autograd(_gradient, setup_context=_save)


def rmsnorm_steer(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    before: Edits | None = None,
    after: Edits | None = None,
    h_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, h): the normed row and the state it was made from, both shaped like x.

    x, residual [..., d] of one dtype (float32, bfloat16, float16); weight [d]. before, after:
    edits E₁ of the state and E₂ of the normed row, with R the number of rows of x. Without
    residual and `before`, h is x itself. h_out [..., d] (rows may be strided) takes h, e.g. a
    slot of a capture buffer. Differentiable to x, residual, weight, vectors and scales unless
    h_out is given. Raises ValueError for d over 16,384, for shapes that do not fit, and where a
    gradient would have to pass h_out.
    """
    _check(x, weight, residual, before, after, h_out)
    flat_1, flat_2 = _flat(before), _flat(after)
    if not through_op(x, residual, weight, *flat_1, *flat_2):
        if not (flat_1 or flat_2 or use_triton(x)):  # no need to make rows contiguous
            y, state = rmsnorm_steer_reference(x, weight, eps, residual=residual)
            return y, state if h_out is None else h_out.copy_(state)
        h = h_out if h_out is not None else _new_state(x, residual, flat_1)
        y = _forward(x, residual, weight, eps, before, after, h)
        return y, x if h is None else h
    if h_out is None:
        y, h = torch.ops.shardlens.rmsnorm_steer(x, residual, weight, eps, flat_1, flat_2)
        return y, h if residual is not None or before is not None else x
    if needs_gradient(x, residual, weight, *flat_1, *flat_2):
        raise ValueError("h_out passes no gradient: leave it out, or use torch.no_grad()")
    y = torch.ops.shardlens.rmsnorm_steer_into(h_out, x, residual, weight, eps, flat_1, flat_2)
    return y, h_out


def _check(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    before: Edits | None,
    after: Edits | None,
    h_out: Tensor | None,
) -> None:
    d = x.shape[-1]
    if not 0 < d <= MOST_COLUMNS:
        raise ValueError(f"rows have {d} numbers, which is not 1 to {MOST_COLUMNS}")
    if weight.shape != (d,):
        raise ValueError(f"weight has shape {list(weight.shape)}, rows have {d} numbers")
    for name, other in (("residual", residual), ("h_out", h_out)):
        if other is not None and (other.numel() != x.numel() or other.dtype != x.dtype):
            raise ValueError(f"{name} must have the shape and the dtype of x")
    for edits in (before, after):
        if edits is not None:
            edits.check(x.numel() // d, d)

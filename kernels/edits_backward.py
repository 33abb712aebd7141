"""Gradients of edits: to the row, to its scale, and to the vector it was edited with.

Where g is the gradient to the result, p = a·u, q = g·u, b = a + s v, r = |a| / |b|:

    ADD            da = g                              ds = g·v    dv = s g
    ABLATE         da = g - s q u                      ds = -p q   du = -s (p g + q a)
    CLAMP          da = g - q u                        ds = q      du = (s - p) g - q a
    ADD_KEEP_NORM  db = r (g - (g·b) b / |b|²)         ds = db·v   dv = s db
                   da = db + (g·b) a / (|a| |b|)
    dv = (du - (du·u) u) / |v|    where v enters through u

Reads a and g and writes da; where vectors want a gradient, writes one row of dv for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton
from .edits import ABLATE, ADD_KEEP_NORM, CLAMP, Edits, chosen, table_arguments, table_row
from .launch import block_and_warps, launch, wide
from .triton_shim import tl, triton

_ABLATE, _CLAMP = tl.constexpr(ABLATE), tl.constexpr(CLAMP)
_KEEP_NORM = tl.constexpr(ADD_KEEP_NORM)
# Columns held in registers at once; wider rows are walked in parts, twice.
MOST_COLUMNS = 4096


def edit_gradient_reference(a: Tensor, grad: Tensor, edits: Edits) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to a [R, d], to each row's scale [R] and to each row's vector [R, d].

    a and grad are wide; rows without an edit pass their gradient on.
    """
    v, mode, s, is_edited = chosen(edits, a.dtype)

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(-1, keepdim=True)

    vv = dot(v, v)
    inverse = torch.where(vv > 0, 1 / vv.where(vv > 0, 1).sqrt(), 0)  # 1 / |v|
    u = v * inverse
    p, q = dot(a, u), dot(grad, u)
    ablates, clamps, keeps = mode == ABLATE, mode == CLAMP, mode == ADD_KEEP_NORM
    da = grad - torch.where(ablates, s * q, torch.where(clamps, q, 0)) * u
    ds = torch.where(ablates, -p * q, torch.where(clamps, q, dot(grad, v)))
    of_g = torch.where(ablates, -s * p, s - p)
    of_a = torch.where(ablates, -s * q, -q)
    through_u = (of_g * grad + of_a * a - (of_g * q + of_a * p) * u) * inverse
    dv = torch.where(ablates | clamps, through_u, s * grad)

    b = a + s * v
    aa, bb, gb = dot(a, a), dot(b, b), dot(grad, b)
    whole = (aa > 0) & (bb > 0)
    norms = (aa * bb).where(whole, 1).sqrt()
    db = (aa / norms).where(whole, 0) * (grad - gb / bb.where(whole, 1) * b)
    da = torch.where(keeps, db + (gb / norms).where(whole, 0) * a, da)
    ds, dv = torch.where(keeps, dot(db, v), ds), torch.where(keeps, s * db, dv)
    da = torch.where(is_edited, da, grad)
    return da, ds.where(is_edited, 0)[:, 0], dv.where(is_edited, 0)


@triton.jit
def _edit_backward_kernel(
    a, grad,  # [R, d]
    da, dv, ds,  # [R, d], [R, d], [R]
    vectors, modes, index, scale,
    d, n, a_stride, grad_stride, stride,
    WANT_VECTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    vector_row = table_row(index, row, n)
    is_edited = vector_row >= 0
    vector = vectors + tl.where(is_edited, vector_row, 0) * stride
    s = tl.load(scale + row)
    mode = tl.load(modes + tl.where(is_edited, vector_row, 0))
    # Every gradient is a mix of a, v and g with factors from six sums over the row.
    av = tl.zeros([BLOCK], tl.float32)
    vv, gv, aa, bb, gb = av, av, av, av, av
    if is_edited:
        for start in range(0, d, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < d
            state = tl.load(a + row * a_stride + column, mask=inside, other=0).to(tl.float32)
            g = tl.load(grad + row * grad_stride + column, mask=inside, other=0).to(tl.float32)
            v = tl.load(vector + column, mask=inside, other=0).to(tl.float32)
            b = state + s * v
            av, vv, gv = av + state * v, vv + v * v, gv + g * v
            aa, bb, gb = aa + state * state, bb + b * b, gb + g * b
    of_a, of_v, of_g, row_ds, v_of_a, v_of_v, v_of_g = _factors(
        tl.sum(av, 0), tl.sum(vv, 0), tl.sum(gv, 0),
        tl.sum(aa, 0), tl.sum(bb, 0), tl.sum(gb, 0), mode, s, is_edited,
    )  # fmt: skip
    tl.store(ds + row, row_ds)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0).to(tl.float32)
        row_da, row_dv = g, tl.zeros([BLOCK], tl.float32)
        if is_edited:
            state = tl.load(a + row * a_stride + column, mask=inside, other=0).to(tl.float32)
            v = tl.load(vector + column, mask=inside, other=0).to(tl.float32)
            row_da = of_a * state + of_v * v + of_g * g
            row_dv = v_of_a * state + v_of_v * v + v_of_g * g
        tl.store(da + row * d + column, row_da.to(da.dtype.element_ty), mask=inside)
        if WANT_VECTORS:
            tl.store(dv + row * d + column, row_dv, mask=inside)


@triton.jit
def _factors(av, vv, gv, aa, bb, gb, mode, s, is_edited):
    """(of a, v, g in da; ds; of a, v, g in dv), from inner products of the row."""
    inverse = tl.where(vv > 0, tl.div_rn(1.0, tl.sqrt_rn(vv)), 0.0)
    p, q = av * inverse, gv * inverse
    of_a, of_v, of_g, ds = 0.0, 0.0, 1.0, gv
    v_of_a, v_of_v, v_of_g = 0.0, 0.0, s
    if (mode == _ABLATE) | (mode == _CLAMP):
        ablates = mode == _ABLATE
        of_v = -tl.where(ablates, s * q, q) * inverse
        ds = tl.where(ablates, -p * q, q)
        u_of_g, u_of_a = tl.where(ablates, -s * p, s - p), tl.where(ablates, -s * q, -q)
        v_of_a, v_of_g = u_of_a * inverse, u_of_g * inverse
        v_of_v = -(u_of_g * q + u_of_a * p) * inverse * inverse
    elif mode == _KEEP_NORM:
        whole = (aa > 0) & (bb > 0)
        norms = tl.sqrt_rn(aa * bb)
        ratio = tl.where(whole, tl.div_rn(aa, norms), 0.0)
        along_b = -ratio * tl.where(whole, tl.div_rn(gb, bb), 0.0)
        # db = ratio g + along_b (a + s v)
        of_a, of_v, of_g = along_b + tl.where(whole, tl.div_rn(gb, norms), 0.0), along_b * s, ratio
        ds = ratio * gv + along_b * (av + s * vv)
        v_of_a, v_of_v, v_of_g = s * along_b, s * along_b * s, s * ratio
    return of_a, of_v, of_g, tl.where(is_edited, ds, 0.0), v_of_a, v_of_v, v_of_g


def edit_backward(
    a: Tensor, grad: Tensor, edits: Edits, out_dtype: torch.dtype, want_vectors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(da [R, d] in out_dtype, d_vectors [n, d], d_scale [R]) for rows a, grad [R, d].

    d_vectors is zero where it is not wanted.
    """
    if use_triton(a):
        (n_rows, d), wide_dtype = a.shape, torch.float32
        da = torch.empty(a.shape, dtype=out_dtype, device=a.device)
        dv = torch.empty(a.shape if want_vectors else 0, dtype=wide_dtype, device=a.device)
        ds = torch.empty(n_rows, dtype=wide_dtype, device=a.device)
        table, n, stride = table_arguments(edits)
        launch(
            _edit_backward_kernel,
            (n_rows,),
            a, grad, da, dv, ds, *table, d, n, a.stride(0), grad.stride(0), stride,
            WANT_VECTORS=want_vectors, **block_and_warps(min(d, MOST_COLUMNS), 16),
        )  # fmt: skip
    else:
        da, ds, dv = edit_gradient_reference(wide(a), wide(grad), edits)
    d_vectors = torch.zeros(edits.vectors.shape, dtype=ds.dtype, device=ds.device)
    if want_vectors and d_vectors.shape[0]:
        # rows without an edit have a gradient of zeros, wherever it is added
        d_vectors.index_add_(0, edits.index.long().clamp(0, d_vectors.shape[0] - 1), dv)
    return da.to(out_dtype), d_vectors.to(edits.vectors.dtype), ds.to(edits.scale.dtype)

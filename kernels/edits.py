"""Edits of hidden states: one vector of a table, with a scale, for each row.

a [d] is the row, v its vector, u = v / |v|, s its scale:

    ADD            a + s v
    ABLATE         a - s (a·u) u               s = 1 removes the component along u
    CLAMP          a + (s - a·u) u             the component becomes s
    ADD_KEEP_NORM  (a + s v) · |a| / |a + s v|

Their gradients are in `edits_backward.py`. A vector of zeros has u = 0. The table, the indices and
the scales lie in device memory, so that a captured CUDA graph follows their changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import wide
from .triton_shim import tl, triton

MODES = ("add", "ablate", "clamp", "add_keep_norm")
ADD, ABLATE, CLAMP, ADD_KEEP_NORM = range(4)
_ABLATE, _CLAMP = tl.constexpr(ABLATE), tl.constexpr(CLAMP)
_KEEP_NORM = tl.constexpr(ADD_KEEP_NORM)


@dataclass(frozen=True)
class Edits:
    """A table of n vectors, and for each of R rows the vector that edits it, with a scale."""

    vectors: Tensor  # [n, d] any float dtype
    modes: Tensor  # [n] int32, indices into MODES
    index: Tensor  # [R] int32 or int64, a row of `vectors`; no edit where it is outside 0 to n - 1
    scale: Tensor  # [R] float32

    def check(self, n_rows: int, d: int) -> None:
        """Raise ValueError for an empty table, or shapes that do not fit n_rows rows of d."""
        n = self.vectors.shape[0]
        if n == 0:
            raise ValueError("the table of edits holds no vector: leave the edits out")
        expected = {"vectors": (n, d), "modes": (n,), "index": (n_rows,), "scale": (n_rows,)}
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"edits.{name} has shape {list(found)}, it needs {list(shape)}")


def table_arguments(edits: Edits | None) -> tuple[tuple[Any, ...], int, int]:
    """The kernels' arguments for an edit: its four tensors, n and the stride of a vector."""
    if edits is None:
        return (None,) * 4, 0, 0
    vectors = edits.vectors if edits.vectors.stride(-1) == 1 else edits.vectors.contiguous()
    others = (t.contiguous() for t in (edits.modes, edits.index, edits.scale))
    return (vectors, *others), vectors.shape[0], vectors.stride(0)


def chosen(edits: Edits, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row: vector [R, d], mode, scale [R, 1], and whether it is edited [R, 1]."""
    n = edits.vectors.shape[0]
    is_edited = ((edits.index >= 0) & (edits.index < n))[:, None]
    index = edits.index.where(is_edited[:, 0], 0).long()
    vectors, modes = edits.vectors[index].to(dtype), edits.modes[index][:, None]
    return vectors, modes, edits.scale[:, None].to(dtype), is_edited


def edit_reference(x: Tensor, edits: Edits) -> Tensor:
    """Edit the rows of x [R, d]; those without an edit are returned unchanged."""
    a = wide(x)
    v, mode, s, is_edited = chosen(edits, a.dtype)
    vv = (v * v).sum(-1, keepdim=True)
    inverse = torch.where(vv > 0, 1 / vv.where(vv > 0, 1), 0)  # 1 / |v|²
    component = (a * v).sum(-1, keepdim=True) * inverse
    coefficient = torch.where(mode == ABLATE, -s * component, s)
    to_scale = s * inverse.where(vv > 0, 1).sqrt() * (vv > 0) - component
    coefficient = torch.where(mode == CLAMP, to_scale, coefficient)
    b = a + coefficient * v
    bb = (b * b).sum(-1, keepdim=True)
    aa = (a * a).sum(-1, keepdim=True)
    keeps = (mode == ADD_KEEP_NORM) & (bb > 0) & (aa > 0)
    ratio = (aa.where(keeps, 1) / bb.where(keeps, 1)).sqrt()
    gone = (mode == ADD_KEEP_NORM) & ~keeps  # no norm to restore, or nothing to give it to
    edited = (b * ratio).masked_fill(gone, 0)
    return torch.where(is_edited, edited.to(x.dtype), x)


@triton.jit
def table_row(index, row, n):
    """The row of the table that `row` is edited with, int64; -1 for none."""
    vector_row = tl.load(index + row).to(tl.int64)
    return tl.where(vector_row < n, vector_row, -1)


@triton.jit
def load_edit(vectors, modes, scale, vector_row, row, stride, column, inside):
    """Vector, mode and scale of an edited row."""
    v = tl.load(vectors + vector_row * stride + column, mask=inside, other=0).to(tl.float32)
    return v, tl.load(modes + vector_row), tl.load(scale + row)


@triton.jit
def edit_row(a, v, mode, s):
    """The edited row, float32; a, v [BLOCK] float32, zero beyond d."""
    vv = tl.sum(v * v, 0)
    inverse = tl.where(vv > 0, tl.div_rn(1.0, vv), 0.0)
    component = tl.sum(a * v, 0) * inverse
    coefficient = tl.where(mode == _ABLATE, -s * component, s)
    coefficient = tl.where(mode == _CLAMP, s * tl.sqrt_rn(inverse) - component, coefficient)
    out = a + coefficient * v
    if mode == _KEEP_NORM:
        bb = tl.sum(out * out, 0)
        out = out * tl.where(bb > 0, tl.sqrt_rn(tl.div_rn(tl.sum(a * a, 0), bb)), 0.0)
    return out

"""Logits of one id per row: the same bits as the head's, so that a target ties with itself.

    z_r = x_r · W[t_r]              x [R, d] normed rows, W [Vs, d] this rank's vocabulary slice

A target's rank is the number of ids whose logit is larger, so its own logit must be rounded as
theirs are. In `head_stats` a tensor core adds the products of a logit, 16 columns at a time, in the
order of the columns, to an accumulator that it truncates; which row and which id of a tile it is
changes nothing. So this kernel makes the same products in tiles of as many rows and the same
steps, of rows and the rows of W that are their targets, and keeps the diagonal. That is BR / Vs of
the head's work. Where the reference runs, its streamed logits are rounded in another order than any
product of one row: there the logit comes with a slack, within which ids count as tied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import HEAD_ROWS
from .head_stats import MOST_REGISTERS, cut_of, runs_kernel
from .head_stats_kernel import dot_precision, load_step
from .launch import launch
from .triton_shim import tl, triton

# Rows of a tile: from 64 on, warp groups multiply where the chip has them, as in the head.
MOST_ROWS = 64
EPS = torch.finfo(torch.float32).eps


def target_logits_reference(
    x: Tensor, weight: Tensor, target_ids: Tensor, *, first_id: int = 0, row_block: int = HEAD_ROWS
) -> Tensor:
    """Logit and slack of each row's target, [R, 2] float32; 0 where the slice lacks it (to sum).

    The slack is 4 eps · Σ |x_i w_i|: two float32 sums of the same d products differ by less.
    """
    local, is_here = _local(target_ids, first_id, weight.shape[0])
    out = torch.zeros(x.shape[0], 2, dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0] if weight.shape[0] else 0, row_block):
        rows = slice(start, start + row_block)
        picked = weight[local[rows]]  # [r, d]
        products = x[rows].float() * picked.float()
        logit, slack = products.sum(-1), products.abs().sum(-1) * (4 * EPS)
        out[rows] = torch.stack((logit, slack), -1) * is_here[rows, None]
    return out


def _local(target_ids: Tensor, first_id: int, n_ids: int) -> tuple[Tensor, Tensor]:
    """(rows of the slice, 0 for targets that it lacks; whether it has them), [R] each."""
    local = target_ids - first_id
    is_here = (local >= 0) & (local < n_ids)
    return local.where(is_here, 0), is_here


@triton.jit
def _target_kernel(
    x,  # [R, d]
    w,  # [Vs, d]
    local_ids,  # [R] int64, inside the slice
    is_here,  # [R] bool
    out,  # [R, 2] zeros
    n_rows, d, x_stride, w_stride,
    BR: tl.constexpr, BD: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, BR)
    row = (tl.program_id(0) * BR + slot).to(tl.int64)
    inside = row < n_rows
    id_ = tl.load(local_ids + row, mask=inside, other=0)
    acc = tl.zeros([BR, BR], tl.float32)
    for first in range(0, d, BD):
        column = first + tl.arange(0, BD)
        a, b = load_step(x, w, row, id_, inside, column, d, x_stride, w_stride, EVEN_D)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    diagonal = tl.sum(tl.where(slot[:, None] == slot[None, :], acc, 0.0), 1)
    there = tl.load(is_here + row, mask=inside, other=0)
    tl.store(out + 2 * row, tl.where(there, diagonal, 0.0), mask=inside)


def _forward(x: Tensor, weight: Tensor, target_ids: Tensor, first_id: int, k: int) -> Tensor:
    if not runs_kernel(x, weight, k):
        return target_logits_reference(x, weight, target_ids, first_id=first_id)
    out = torch.zeros(x.shape[0], 2, dtype=torch.float32, device=x.device)
    if not out.numel() or not weight.shape[0]:
        return out
    x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight))
    local, is_here = _local(target_ids, first_id, weight.shape[0])
    rows, _, columns = cut_of(x, weight, k, 1).configs[0].tile[:3]
    rows = min(rows, MOST_ROWS)
    launch(
        _target_kernel,
        (triton.cdiv(x.shape[0], rows),),
        x, weight, local, is_here, out,
        x.shape[0], x.shape[1], x.stride(0), weight.stride(0),
        BR=rows, BD=columns, EVEN_D=x.shape[1] % columns == 0, PRECISION=dot_precision(x.dtype),
        num_warps=4, num_stages=2, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return out


@torch.library.custom_op("shardlens::target_logits", mutates_args=())
def _op(x: Tensor, weight: Tensor, target_ids: Tensor, first_id: int, k: int) -> Tensor:
    return _forward(x, weight, target_ids, first_id, k)


@_op.register_fake
def _(x: Tensor, weight: Tensor, target_ids: Tensor, first_id: int, k: int) -> Tensor:
    return x.new_empty(x.shape[0], 2, dtype=torch.float32)


def target_logits(
    x: Tensor, weight: Tensor, target_ids: Tensor, *, first_id: int = 0, k: int = 1
) -> Tensor:
    """Logit of each row's target and the slack of its ties: [R, 2] float32.

    x [R, d], weight [Vs, d] of one dtype; target_ids [R] int64, counted like the slice's ids from
    first_id. Both are 0 where the slice lacks the target, so that those of all slices can be
    summed. k: that of the `head_stats` call whose `Target` this makes, which decides what runs.
    Not differentiable. Raises ValueError for shapes that do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"rows {list(x.shape)} and weight {list(weight.shape)} do not fit")
    if target_ids.shape != x.shape[:1]:
        raise ValueError(
            f"target_ids {list(target_ids.shape)} are not one for each of {len(x)} rows"
        )
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.shardlens.target_logits(x, weight, target_ids, first_id, k)
        return out
    return _forward(x, weight, target_ids, first_id, k)

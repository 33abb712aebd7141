"""Gated activation of the MLP (Shazeer, arXiv 2002.05202), on the fused projection.

    y = silu(g) · u,  silu(g) = g · s(g), s: sigmoid     gate_up [R, 2f] = (g, u), y [R, f]
    dg = dy · u · s(g) · (1 + g · (1 - s(g)))            du = dy · silu(g)

Reads 2f and writes f numbers per row (backward: reads 3f, writes 2f), which bounds its speed.
Arithmetic is float32, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import through_op, use_triton
from .launch import launch, rows_of, wide
from .rounding import sigmoid as exact_sigmoid
from .triton_shim import tl, triton

BLOCK, WARPS = 1024, 4


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2f], gate first -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward_reference(dy: Tensor, gate_up: Tensor) -> Tensor:
    """dy [..., f], gate_up [..., 2f] -> gradient to gate_up [..., 2f]."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((d_gate, dy * gate * sigmoid), -1).to(gate_up.dtype)


@triton.jit
def _swiglu_kernel(gate_up, y, f, in_stride, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < f
    gate = tl.load(gate_up + row * in_stride + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + f + column, mask=inside, other=0).to(tl.float32)
    out = gate * exact_sigmoid(gate) * up
    tl.store(y + row * f + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(dy, gate_up, d_gate_up, f, dy_stride, in_stride, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < f
    grad = tl.load(dy + row * dy_stride + column, mask=inside, other=0).to(tl.float32)
    gate = tl.load(gate_up + row * in_stride + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + f + column, mask=inside, other=0).to(tl.float32)
    sigmoid = exact_sigmoid(gate)
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = grad * gate * sigmoid
    out = d_gate_up + row * 2 * f + column
    tl.store(out, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(out + f, d_up.to(d_gate_up.dtype.element_ty), mask=inside)


def _forward(gate_up: Tensor) -> Tensor:
    if not use_triton(gate_up):
        return swiglu_reference(gate_up)
    rows = rows_of(gate_up)
    y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    f = y.shape[-1]
    grid = (rows.shape[0], triton.cdiv(f, BLOCK))
    launch(_swiglu_kernel, grid, rows, y, f, rows.stride(0), BLOCK=BLOCK, num_warps=WARPS)
    return y


@torch.library.custom_op("shardlens::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    return _forward(gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """As `swiglu_backward_reference`."""
    if not use_triton(gate_up):
        return swiglu_backward_reference(dy, gate_up)
    # autograd may hand over an expanded gradient, whose rows share memory
    grads, rows = dy.contiguous().reshape(-1, dy.shape[-1]), rows_of(gate_up)
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    f = dy.shape[-1]
    launch(
        _swiglu_backward_kernel,
        (rows.shape[0], triton.cdiv(f, BLOCK)),
        grads,
        rows,
        d_gate_up,
        f,
        grads.stride(0),
        rows.stride(0),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return d_gate_up


@torch.library.custom_op("shardlens::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    return swiglu_backward(dy, gate_up)


@_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    grad: Tensor = torch.ops.shardlens.swiglu_backward(dy, ctx.saved_tensors[0])
    return grad


_swiglu.register_autograd(_gradient, setup_context=_save)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of gate_up [..., 2f], gate first -> [..., f] in its dtype.

    Differentiable. Raises ValueError where the last dim is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[-1]} columns, which is not two equal halves")
    if through_op(gate_up):
        out: Tensor = torch.ops.shardlens.swiglu(gate_up)
        return out
    return _forward(gate_up)

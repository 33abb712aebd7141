"""Collectives of a tensor-parallel group: each counts its bytes, none changes its input.

Bytes are those one rank sends when the collective runs as a ring over p ranks: an all-reduce of
n bytes sends 2·n·(p-1)/p, an all-gather of n bytes per rank sends n·(p-1).

Under torch.compile they become functional collectives, which the compiler can keep inside its
graph. These count no bytes: a compiled graph cannot write to the counter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from .group import TensorParallel


def all_reduce(x: Tensor, parallel: TensorParallel) -> Tensor:
    """Sum of `x` over the ranks, the same on each. Not differentiable: see `reduce_from_ranks`."""
    if parallel.size == 1:
        return x
    if torch.compiler.is_compiling():
        return functional.all_reduce(x.contiguous(), "sum", _group(parallel))
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=parallel.group)
    ring_bytes = 2 * total.numel() * total.element_size() * (parallel.size - 1) // parallel.size
    parallel.traffic.add("all_reduce", ring_bytes)
    return total


def all_gather(x: Tensor, parallel: TensorParallel) -> Tensor:
    """`x` of every rank, stacked in rank order: [...] -> [p, ...]."""
    if parallel.size == 1:
        return x[None]
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return functional.all_gather_tensor(x[None], 0, _group(parallel))
    gathered = x.new_empty((parallel.size, *x.shape))
    dist.all_gather(list(gathered.unbind(0)), x, group=parallel.group)
    parallel.traffic.add("all_gather", x.numel() * x.element_size() * (parallel.size - 1))
    return gathered


def _group(parallel: TensorParallel) -> dist.ProcessGroup:
    assert parallel.group is not None
    return parallel.group


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.parallel), None


class _ReduceFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        return all_reduce(x, parallel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def copy_to_ranks(x: Tensor, parallel: TensorParallel) -> Tensor:
    """Identity whose gradient is summed over ranks: goes before a column-parallel product."""
    if parallel.size == 1 or not torch.is_grad_enabled():
        return x
    out: Tensor = _CopyToRanks.apply(x, parallel)
    return out


def reduce_from_ranks(x: Tensor, parallel: TensorParallel) -> Tensor:
    """Sum over ranks whose gradient passes unchanged: goes after a row-parallel product."""
    if parallel.size == 1 or not torch.is_grad_enabled():
        return all_reduce(x, parallel)
    out: Tensor = _ReduceFromRanks.apply(x, parallel)
    return out


@contextmanager
def agreed(parallel: TensorParallel) -> Iterator[None]:
    """Run a block in which any rank may fail, and fail on every rank if one did.

    Without it, a rank that meets a bad file leaves the others waiting in their next collective.
    The block itself must not communicate.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if parallel.size == 1:
        if error is not None:
            raise error
        return
    errors: list[Any] = [None] * parallel.size
    report = None if error is None else (isinstance(error, ValueError), str(error))
    dist.all_gather_object(errors, report, group=parallel.group)
    if error is not None:
        raise error
    for rank, seen in enumerate(errors):
        if seen is not None:
            is_users_error, message = seen
            raise ValueError(message) if is_users_error else RuntimeError(f"rank {rank}: {message}")

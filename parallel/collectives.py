"""Collectives of a tensor-parallel group: each counts its bytes, none changes its input.

Bytes are those one rank sends when the collective runs as a ring over p ranks: an all-reduce of
n bytes sends 2·n·(p-1)/p, an all-gather of n bytes per rank sends n·(p-1).

Under torch.compile they become functional collectives, which the compiler can keep inside its
graph. These count no bytes: a compiled graph cannot write to the counter. Nor does `exchange`, by
which ranks agree on how to go on: it is no part of what a model sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from .group import Axes, TensorParallel

MESSAGE_BYTES = 1024  # of an error that one rank reports to the others
_NO_ERROR, _USERS_ERROR, _OTHER_ERROR = b"\0", b"\1", b"\2"


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


def gather_over(x: Tensor, axes: Axes) -> Tensor:
    """`x` of every rank of the axes, stacked, ranks of the last axis fastest: [...] -> [p, ...]."""
    stacked = x[None]
    for axis in reversed(axes):
        stacked = all_gather(stacked, axis).flatten(0, 1)
    return stacked


def reduce_over(x: Tensor, axes: Axes) -> Tensor:
    """Sum of `x` over the ranks of the axes, the same on each. Not differentiable."""
    for axis in axes:
        x = all_reduce(x, axis)
    return x


def exchange(message: bytes, parallel: TensorParallel) -> list[bytes]:
    """The message of every rank in rank order; they must be of one length."""
    if parallel.size == 1:
        return [message]
    is_nccl = "nccl" in dist.get_backend(parallel.group)
    device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
    sent = torch.tensor(list(message), dtype=torch.uint8, device=device)
    gathered = sent.new_empty((parallel.size, len(message)))
    dist.all_gather(list(gathered.unbind(0)), sent, group=parallel.group)
    return [bytes(row) for row in gathered.tolist()]


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
    The block itself must not communicate. Of a message, the other ranks get MESSAGE_BYTES at most.
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
    reports = exchange(_report(error), parallel)
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        status, message = report[:1], report[1:].rstrip(b"\0").decode(errors="ignore")
        if status == _USERS_ERROR:
            raise ValueError(message)
        if status == _OTHER_ERROR:
            raise RuntimeError(f"rank {rank}: {message}")


def _report(error: Exception | None) -> bytes:
    """A status and the error's message in UTF-8, cut or padded to MESSAGE_BYTES."""
    status = _USERS_ERROR if isinstance(error, ValueError) else _OTHER_ERROR
    if error is None:
        status = _NO_ERROR
    message = "" if error is None else str(error)
    return status + message.encode(errors="replace")[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")

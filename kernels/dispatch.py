"""The one switch: do operations run as Triton kernels or as their PyTorch references?

`auto` (the default) takes the kernels for CUDA tensors where Triton is installed, and the
references for everything else. `triton` and `reference` force one of the two; `triton` takes CPU
tensors only in Triton's interpreter, which is for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .triton_shim import HAS_TRITON

IMPLEMENTATIONS = ("auto", "triton", "reference")
_chosen = "auto"


def set_implementation(name: str) -> None:
    """Choose for the whole process. Raises ValueError for a name not in IMPLEMENTATIONS."""
    global _chosen
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name}: there are {', '.join(IMPLEMENTATIONS)}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("the Triton kernels are asked for, but the package triton is missing")
    _chosen = name


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Choose for the duration of a block, for all threads of the process."""
    before = _chosen
    set_implementation(name)
    try:
        yield
    finally:
        set_implementation(before)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: Tensor) -> bool:
    """Whether an operation on `x` runs as a kernel. ValueError where it should but cannot."""
    if _chosen == "auto":
        return HAS_TRITON and x.is_cuda
    if _chosen == "triton" and not (x.is_cuda or x.is_meta or interpreting()):
        raise ValueError(
            "the Triton kernels are asked for, but they need CUDA tensors: "
            "choose auto or reference on a CPU"
        )
    return _chosen == "triton"


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def through_op(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its registered op, for autograd or a compiler to see it.

    Otherwise the implementation is called directly: dispatching a custom op costs tens of
    microseconds of host time, longer than many a decode kernel runs.
    """
    return torch.compiler.is_compiling() or needs_gradient(*tensors)

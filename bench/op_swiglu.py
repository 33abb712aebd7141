"""The gated activation of the MLP; its backward is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import swiglu, swiglu_reference
from ..kernels.swiglu import swiglu_backward
from .models import Grid, ModelShape
from .op import Case, Cost, Given, Impl, New, Op, attribute


def _liger() -> Impl:
    forward = attribute("liger_kernel.ops.swiglu", "swiglu_fused_gate_up_forward")
    return lambda given: forward(given["gate_up"])[1]


class SwigluOp(Op):
    name = "swiglu"
    ours, reference = staticmethod(swiglu), staticmethod(swiglu_reference)
    result_names = ("y",)
    tests = ("test_swiglu",)
    odd_cases = (Case(name, {"rows": 7, "f": 1217}),)
    compiled: ClassVar = {"swiglu": (Case(name, {"rows": 512, "f": 14336}),)}
    rivals: ClassVar = {"": {"liger": _liger}}

    def shapes(self, model: ModelShape, ranks: int, grid: Grid) -> Iterator[Case]:
        for rows in grid.rows:
            yield self.case({"rows": rows, "f": model.f // ranks})

    def make(self, case: Case, device: torch.device) -> Given:
        new = New(device, case.dtype)
        return {"gate_up": new(case.sizes["rows"], 2 * case.sizes["f"])}

    def cost(self, case: Case) -> Cost:
        numbers = case.sizes["rows"] * case.sizes["f"]
        return Cost(case.dtype.itemsize * 3 * numbers, 5 * numbers)

    def on_rows(self, given: Given, rows: Tensor) -> Given:
        return {"gate_up": given["gate_up"][rows]}

    @property
    def launches(self) -> dict[str, Callable[[torch.device], None]]:
        return {**super().launches, "swiglu_backward": _backward}


def _backward(device: torch.device) -> None:
    new = New(device, torch.bfloat16)
    swiglu_backward(new(512, 14336), new(512, 2 * 14336))

"""Residual add, RMSNorm and the edits of steering, in one kernel; its backward is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import Edits, rmsnorm_steer, rmsnorm_steer_reference
from ..kernels.rmsnorm_steer_backward import rmsnorm_steer_backward
from .models import GRIDS, Grid, ModelShape
from .op import (
    EPS,
    TABLE_VECTORS,
    Case,
    Claim,
    Cost,
    Given,
    Impl,
    New,
    Op,
    attribute,
    copy_share,
    rival_ratio,
)

VARIANTS = ("norm", "residual", "edits")
WIDTHS = (4096, 8192, 16384)  # that are compiled


def _liger_norm() -> Impl:
    function = attribute("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    return lambda given: (function.apply(given["x"], given["weight"], given["eps"]),)


def _liger_residual_norm() -> Impl:
    function = attribute("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    return lambda given: function.apply(
        given["x"], given["residual"], given["weight"], given["eps"]
    )


def _quack_norm() -> Impl:
    rmsnorm = attribute("quack.rmsnorm", "rmsnorm")
    return lambda given: (rmsnorm(given["x"], given["weight"], eps=given["eps"]),)


def _quack_residual_norm() -> Impl:
    rmsnorm = attribute("quack.rmsnorm", "rmsnorm")
    return lambda given: rmsnorm(
        given["x"], given["weight"], residual=given["residual"], eps=given["eps"], prenorm=True
    )


class NormOp(Op):
    name = "rmsnorm_steer"
    ours, reference = staticmethod(rmsnorm_steer), staticmethod(rmsnorm_steer_reference)
    result_names = ("y", "h")
    tests = ("test_rmsnorm_steer",)
    odd_cases = (
        Case(name, {"rows": 123, "d": 507}, "norm"),
        Case(name, {"rows": 1, "d": 4100}, "residual"),
        Case(name, {"rows": 123, "d": 5120}, "edits"),
    )
    compiled: ClassVar = {
        "rmsnorm": tuple(
            Case("rmsnorm_steer", {"rows": 512, "d": d}, variant)
            for d in (128, 5120, *WIDTHS)
            for variant in ("norm", "residual")
        ),
        "rmsnorm_steer": tuple(
            Case("rmsnorm_steer", {"rows": 512, "d": d}, "edits") for d in WIDTHS
        ),
    }
    rivals: ClassVar = {
        "norm": {"liger": _liger_norm, "quack": _quack_norm},
        "residual": {"liger": _liger_residual_norm, "quack": _quack_residual_norm},
    }

    def shapes(self, model: ModelShape, ranks: int, grid: Grid) -> Iterator[Case]:
        for variant in VARIANTS:
            for rows in grid.rows:
                yield self.case({"rows": rows, "d": model.d}, variant)

    def make(self, case: Case, device: torch.device) -> Given:
        rows, d = case.sizes["rows"], case.sizes["d"]
        new = New(device, case.dtype)
        given: Given = {"x": new(rows, d), "weight": new(d), "eps": EPS}
        if case.variant != "norm":
            given["residual"] = new(rows, d)
        if case.variant == "edits":
            given |= {"before": new.edits(rows, d), "after": new.edits(rows, d)}
        return given

    def cost(self, case: Case) -> Cost:
        rows, d = case.sizes["rows"], case.sizes["d"]
        moved = {"norm": 2, "residual": 4, "edits": 4}[case.variant]
        size, edits = case.dtype.itemsize, 2 if case.variant == "edits" else 0
        table = TABLE_VECTORS * (size * d + 4) + 8 * rows
        total = size * (moved * rows * d + d) + edits * table
        return Cost(total, rows * d * (4 + moved // 4 + 6 * edits))

    def other_impls(self, case: Case) -> dict[str, Impl]:
        if case.variant != "norm":
            return {}
        d = case.sizes["d"]
        return {"F.rms_norm": lambda given: (F.rms_norm(given["x"], (d,), given["weight"], EPS),)}

    def on_rows(self, given: Given, rows: Tensor) -> Given:
        def part(value: Any, name: str) -> Any:
            if isinstance(value, Edits):
                return replace(value, index=value.index[rows], scale=value.scale[rows])
            return value[rows] if name in ("x", "residual") else value

        return {name: part(value, name) for name, value in given.items()}

    def claims(self) -> list[Claim]:
        named = {"edits": "with residual and edits", "residual": "with residual", "norm": "alone"}
        return [
            *(
                Claim(
                    f"norm 16,384 x 4,096 {text}: share of measured copy bandwidth",
                    [self.case({"rows": 16384, "d": 4096}, variant)],
                    copy_share,
                    0.9,
                )
                for variant, text in named.items()
            ),
            Claim(
                "norm, whole grid: best rival's time over ours, noise allowed",
                self.cases(GRIDS["full"]),
                rival_ratio,
                1.0,
                compiled=True,
            ),
        ]

    @property
    def launches(self) -> dict[str, Callable[[torch.device], None]]:
        return {**super().launches, "rmsnorm_backward": _backward}


def _backward(device: torch.device) -> None:
    new = New(device, torch.bfloat16)
    for d in WIDTHS:
        x, weight, edits = new(4096, d), new(d), new.edits(4096, d)
        rmsnorm_steer_backward(x, x, x, x, x, x, weight, EPS, edits, edits, True, True)
        rmsnorm_steer_backward(x, x, x, x, x, x, weight, EPS, None, None, True, False)

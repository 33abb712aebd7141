"""Attention of a decode step: one query position per request over its cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import decode_attention, decode_attention_reference
from .models import MODELS, Grid, ModelShape
from .op import Case, Claim, Cost, Given, Impl, New, Op, copy_share

COMPILED_SIZES = (  # requests, query heads, key and value heads, head size
    (8, 32, 8, 128), (8, 64, 8, 128), (1, 16, 2, 128), (512, 32, 32, 128),
    (8, 9, 3, 64), (4, 32, 2, 128), (2, 64, 1, 128), (2, 16, 8, 256),
)  # fmt: skip


class AttentionOp(Op):
    """Every request has as many positions as the cache holds."""

    name = "decode_attention"
    ours, reference = staticmethod(decode_attention), staticmethod(decode_attention_reference)
    result_names = ("out",)
    tests = ("test_decode_attention",)
    odd_cases = (
        Case(name, {"B": 3, "H": 5, "K": 1, "D": 96, "S": 507}),
        Case(name, {"B": 1, "H": 8, "K": 8, "D": 128, "S": 1}),
    )
    compiled: ClassVar = {
        "decode_attention": tuple(
            Case("decode_attention", dict(zip("BHKD", sizes, strict=True), S=8192), dtype=dtype)
            for dtype in (torch.bfloat16, torch.float32)
            for sizes in COMPILED_SIZES
        )
    }

    def shapes(self, model: ModelShape, ranks: int, grid: Grid) -> Iterator[Case]:
        for batch, context in grid.attention:
            yield self.case({"B": batch, **model.heads_per_rank(ranks), "S": context})

    def make(self, case: Case, device: torch.device) -> Given:
        b, h, k, d, context = (case.sizes[name] for name in "BHKDS")
        new = New(device, case.dtype)
        given: Given = {"q": new(b, h, d)}
        given |= {name: new(b, k, context, d) for name in ("keys", "values")}
        return given | {"lengths": torch.full((b,), context, device=device), "span": context}

    def cost(self, case: Case) -> Cost:
        b, h, k, d, context = (case.sizes[name] for name in "BHKDS")
        total = case.dtype.itemsize * (2 * b * k * context * d + 2 * b * h * d) + 8 * b
        return Cost(total, 4 * b * h * context * d)

    def other_impls(self, case: Case) -> dict[str, Impl]:
        def without_mask(given: Given) -> Tensor:  # as if the host knew that no request is shorter
            q = given["q"][:, :, None]
            return F.scaled_dot_product_attention(
                q, given["keys"], given["values"], enable_gqa=True
            )[:, :, 0]

        return {"sdpa": without_mask}

    def claims(self) -> list[Claim]:
        heads = MODELS["llama-3.1-8b"].heads_per_rank(1)
        return [
            Claim(
                f"decode attention, batch 8, context {context:,}: share of measured copy bandwidth",
                [self.case({"B": 8, **heads, "S": context})],
                copy_share,
                0.8,
            )
            for context in (1500, 8192)
        ]

    def sanitize(self, new: New) -> None:
        super().sanitize(new)
        keys, values = (new(2, 2, 512, 128) for _ in range(2))
        lengths = torch.tensor((1, 500), device=new.device)
        assert decode_attention(new(2, 8, 128), keys, values, lengths).isfinite().all()

"""Rotary embedding of queries and keys, with their norms, written straight into the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from ..kernels import rope_angles_reference, rope_qk, rope_qk_reference
from .models import Grid, ModelShape
from .op import EPS, Case, Cost, Given, Impl, New, Op, Results

CACHE_POSITIONS = 2048  # capacity of the cache that a decode step writes into


class RopeOp(Op):
    name = "rope_qk"
    ours, reference = staticmethod(rope_qk), staticmethod(rope_qk_reference)
    result_names = ("q", "k", "v")
    tests = ("test_rope_qk",)
    odd_cases = (
        Case(name, {"B": 3, "T": 5, "H": 5, "K": 1, "D": 96, "S": 41}, "plain"),
        Case(name, {"B": 2, "T": 3, "H": 6, "K": 2, "D": 128, "S": 50}, "normed"),
    )
    compiled: ClassVar = {
        "rope_qk": (
            Case(name, {"B": 8, "T": 1, "H": 32, "K": 8, "D": 128, "S": 8192}, "plain"),
            Case(name, {"B": 8, "T": 1, "H": 64, "K": 8, "D": 128, "S": 8192}, "normed"),
        )
    }

    def shapes(self, model: ModelShape, ranks: int, grid: Grid) -> Iterator[Case]:
        for batch, tokens in grid.rope:
            capacity = max(tokens, CACHE_POSITIONS)
            sizes = {"B": batch, "T": tokens, **model.heads_per_rank(ranks), "S": capacity}
            yield self.case(sizes, "normed" if model.qk_norm else "plain")

    def make(self, case: Case, device: torch.device) -> Given:
        b, t, h, k, d, capacity = (case.sizes[name] for name in "BTHKDS")
        new = New(device, case.dtype)
        starts = torch.randint(capacity - t + 1, (b, 1), device=device)
        positions = starts + torch.arange(t, device=device)
        inv_freq = 1 / 1e4 ** (torch.arange(0, d, 2, device=device) / d)
        cos, sin = rope_angles_reference(positions, inv_freq, case.dtype)
        given: Given = {"qkv": new(b, t, (h + 2 * k) * d), "cos": cos, "sin": sin}
        given |= {name: new(b, k, capacity, d) for name in ("keys", "values")}
        given["positions"] = positions
        if case.variant == "normed":
            given |= {"eps": EPS, "q_weight": new(d), "k_weight": new(d)}
        return given

    def cost(self, case: Case) -> Cost:
        b, t, h, k, d, _ = (case.sizes[name] for name in "BTHKDS")
        numbers = b * t * (h + 2 * k) * d
        weights = 2 * d if case.variant == "normed" else 0
        size = case.dtype.itemsize
        total = size * (2 * numbers + b * t * d + weights) + 8 * b * t  # b t d: cos and sin
        return Cost(total, numbers * (7 if weights else 3))

    def results(self, impl: Impl, given: Given) -> Results:
        keys, values = given["keys"].clone(), given["values"].clone()
        q = impl(given | {"keys": keys, "values": values})
        written = torch.arange(len(keys), device=keys.device)[:, None], given["positions"]
        k, v = (cache.transpose(1, 2)[written] for cache in (keys, values))
        return dict(zip(self.result_names, (q, k, v), strict=True))

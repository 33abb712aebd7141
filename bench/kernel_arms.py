"""What is timed: per operation its inputs, its cost, its arms, and how an arm is checked.

Cost: every input read once, every output written once, however an arm does it; a product of
[n, m] and [m, k] is 2 n m k operations, and what is done per number is counted as one or a few.
Inputs are random, values near 1. An arm takes a dict of arguments, see `Op.make`.

The truth is the operation in float64 without roundings on the way, on up to CHECKED_ROWS rows.
Ours may miss it by as much as the same-dtype PyTorch expression, see `problem_of`; a rival, which
may round in another order, by RIVAL_RELATIVE in all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.decode_attention import decode_attention, decode_attention_reference
from ..kernels.edits import MODES, Edits
from ..kernels.head_stats import head_stats
from ..kernels.head_stats_reference import HeadStats, float_logits, head_stats_reference
from ..kernels.rmsnorm_steer import rmsnorm_steer, rmsnorm_steer_reference
from ..kernels.rope import rope_angles_reference
from ..kernels.rope_qk import rope_qk, rope_qk_reference
from ..kernels.swiglu import swiglu, swiglu_reference
from .rivals import Arm
from .shapes import Case

Given = dict[str, Any]
Results = dict[str, Tensor]
EPS = 1e-5
TABLE_VECTORS = 8
CHECKED_ROWS = 64
# bf16 is what models are served in; CPUs without bf16 products make it a hundred times slower.
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
OURS, EAGER, COMPILED = "shardlens", "eager", "compile"


@dataclass(frozen=True)
class Cost:
    bytes: int
    operations: int


class Op(ABC):
    """One operation. `reference` is the eager arm, and what torch.compile is given."""

    ours: Callable[..., Any]
    reference: Callable[..., Any]
    names: tuple[str, ...]  # of the results

    @abstractmethod
    def make(self, case: Case, device: torch.device) -> Given:
        """Fresh random arguments."""

    @abstractmethod
    def cost(self, case: Case) -> Cost:
        """What the work must move and compute."""

    def more_arms(self, case: Case) -> dict[str, Arm]:
        """PyTorch's own operator for the same work, where it has one."""
        return {}

    def on_rows(self, given: Given, rows: Tensor) -> Given:
        """The arguments for some of the rows; all of them where rows are not apart."""
        return given

    def results(self, arm: Arm, given: Given) -> Results:
        """What an arm computes, by name."""
        out = arm(given)
        return dict(zip(self.names, out if isinstance(out, tuple) else (out,), strict=False))

    def truth(self, given: Given) -> Results:
        return self.results(lambda exact: self.reference(**exact), _double(given))

    def plain(self, given: Given) -> Results:
        return self.results(lambda same: self.reference(**same), given)


class NormOp(Op):
    ours, reference = staticmethod(rmsnorm_steer), staticmethod(rmsnorm_steer_reference)
    names = ("y", "h")

    def make(self, case: Case, device: torch.device) -> Given:
        rows, d = case.sizes["rows"], case.sizes["d"]
        new = _Maker(device, case.dtype)
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

    def more_arms(self, case: Case) -> dict[str, Arm]:
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


class SwigluOp(Op):
    ours, reference = staticmethod(swiglu), staticmethod(swiglu_reference)
    names = ("y",)

    def make(self, case: Case, device: torch.device) -> Given:
        new = _Maker(device, case.dtype)
        return {"gate_up": new(case.sizes["rows"], 2 * case.sizes["f"])}

    def cost(self, case: Case) -> Cost:
        numbers = case.sizes["rows"] * case.sizes["f"]
        return Cost(case.dtype.itemsize * 3 * numbers, 5 * numbers)

    def on_rows(self, given: Given, rows: Tensor) -> Given:
        return {"gate_up": given["gate_up"][rows]}


class RopeOp(Op):
    ours, reference = staticmethod(rope_qk), staticmethod(rope_qk_reference)
    names = ("q", "k", "v")

    def make(self, case: Case, device: torch.device) -> Given:
        b, t, h, k, d, capacity = (case.sizes[name] for name in "BTHKDS")
        new = _Maker(device, case.dtype)
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

    def results(self, arm: Arm, given: Given) -> Results:
        keys, values = given["keys"].clone(), given["values"].clone()
        q = arm(given | {"keys": keys, "values": values})
        where = torch.arange(len(keys), device=keys.device)[:, None], given["positions"]
        written = (cache.transpose(1, 2)[where] for cache in (keys, values))
        return dict(zip(self.names, (q, *written), strict=True))


class AttentionOp(Op):
    """Every request has as many positions as the cache holds."""

    ours, reference = staticmethod(decode_attention), staticmethod(decode_attention_reference)
    names = ("out",)

    def make(self, case: Case, device: torch.device) -> Given:
        b, h, k, d, context = (case.sizes[name] for name in "BHKDS")
        new = _Maker(device, case.dtype)
        given: Given = {"q": new(b, h, d)}
        given |= {name: new(b, k, context, d) for name in ("keys", "values")}
        return given | {"lengths": torch.full((b,), context, device=device), "span": context}

    def cost(self, case: Case) -> Cost:
        b, h, k, d, context = (case.sizes[name] for name in "BHKDS")
        total = case.dtype.itemsize * (2 * b * k * context * d + 2 * b * h * d) + 8 * b
        return Cost(total, 4 * b * h * context * d)

    def more_arms(self, case: Case) -> dict[str, Arm]:
        def without_mask(given: Given) -> Tensor:  # as if the host knew that no request is shorter
            q = given["q"][:, :, None]
            return F.scaled_dot_product_attention(
                q, given["keys"], given["values"], enable_gqa=True
            )[:, :, 0]

        return {"sdpa": without_mask}


class HeadOp(Op):
    """log_sum_exp and entropy stand for the sums; values_of_ids for the ids, as ties are free."""

    ours = staticmethod(head_stats)
    names = ("values", "ids", "log_sum_exp", "entropy")

    @staticmethod
    def reference(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, ...]:
        """With the logits of the whole slice."""
        z = float_logits(x, weight)
        values, ids = z.topk(k)
        log_probs = z.log_softmax(-1)
        return values, ids, z.logsumexp(-1), -(log_probs.exp() * log_probs).sum(-1)

    def make(self, case: Case, device: torch.device) -> Given:
        rows, d, vocab = (case.sizes[name] for name in ("rows", "d", "V"))
        new = _Maker(device, case.dtype)
        weight = new(vocab, d).mul_(d**-0.5)  # logits of size 1
        return {"x": new(rows, d), "weight": weight, "k": case.sizes["k"]}

    def cost(self, case: Case) -> Cost:
        rows, d, vocab, k = (case.sizes[name] for name in ("rows", "d", "V", "k"))
        results = rows * (k * (4 + 8) + 3 * 4)  # values and ids, and max and two sums
        return Cost(case.dtype.itemsize * (vocab * d + rows * d) + results, 2 * rows * vocab * d)

    def more_arms(self, case: Case) -> dict[str, Arm]:
        # not the whole work: the product alone, which nothing that computes logits beats
        return {"product": lambda given: {"product": given["x"] @ given["weight"].T}}

    def on_rows(self, given: Given, rows: Tensor) -> Given:
        return given | {"x": given["x"][rows]}

    def results(self, arm: Arm, given: Given) -> Results:
        out = arm(given)
        if isinstance(out, HeadStats):
            log_sum_exp = out.max + out.sum_exp.log()
            entropy = out.sum_exp.log() - out.sum_dev / out.sum_exp
            out = (out.values, out.ids, log_sum_exp, entropy)
        return out if isinstance(out, dict) else dict(zip(self.names, out, strict=True))

    def truth(self, given: Given) -> Results:
        z = given["x"].double() @ given["weight"].double().T
        log_probs = z.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        values = z.topk(given["k"]).values
        return {"values": values, "log_sum_exp": z.logsumexp(-1), "entropy": entropy, "logits": z}

    def plain(self, given: Given) -> Results:
        return self.results(lambda same: head_stats_reference(**same), given)


BY_NAME: dict[str, Op] = {
    "rmsnorm_steer": NormOp(),
    "swiglu": SwigluOp(),
    "rope_qk": RopeOp(),
    "decode_attention": AttentionOp(),
    "head_stats": HeadOp(),
}


@dataclass(frozen=True)
class _Maker:
    """Random tensors of one dtype on one device."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def edits(self, rows: int, d: int) -> Edits:
        """Every row is edited, the modes by turns."""
        return Edits(
            self(TABLE_VECTORS, d),
            torch.arange(TABLE_VECTORS, dtype=torch.int32, device=self.device) % len(MODES),
            torch.randint(TABLE_VECTORS, (rows,), dtype=torch.int32, device=self.device),
            torch.rand(rows, device=self.device) + 0.5,
        )


def _double(given: Given) -> Given:
    def wide(value: Any) -> Any:
        if isinstance(value, Edits):
            return replace(value, vectors=value.vectors.double())
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if is_float else value

    return {name: wide(value) for name, value in given.items()}

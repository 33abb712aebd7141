"""The head: k candidates and statistics per row, of logits that are never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import (
    HeadStats,
    Noise,
    Target,
    head_stats,
    head_stats_reference,
    target_logits,
    tensor_core_slack,
)
from ..kernels.head_stats_reference import float_logits
from .models import MODELS, Grid, ModelShape
from .op import (
    FLOAT_SLACK,
    OURS,
    Case,
    Claim,
    Cost,
    Given,
    Impl,
    New,
    Op,
    Results,
    Row,
    attribute,
    copy_share,
)

TOP_K = 5
LENS_TAPS = 33  # per position, where every block of a model of 32 is read, and the output


def _cce_logsumexp() -> Impl:
    kernel = attribute("cut_cross_entropy.cce_lse_forward", "cce_lse_forward_kernel")
    return lambda given: {"logsumexp": kernel(given["x"], given["weight"])}


class HeadOp(Op):
    """logsumexp and entropy stand for the sums; ids are held to their logits, as ties are free."""

    name = "head_stats"
    ours = staticmethod(head_stats)
    result_names = ("logits", "token_ids", "logsumexp", "entropy")
    tests = (
        "test_few_rows_linear",  # the head on a CPU multiplies with it
        "test_head_blocks",
        "test_head_cpu",
        "test_head_kernel",
        "test_head_stats",
        "test_sampled_rows",
        "test_target_logits",
        "test_tensor_cores",
    )
    odd_cases = (
        Case(name, {"rows": 1, "d": 507, "V": 509, "k": 3}),
        Case(name, {"rows": 123, "d": 96, "V": 4099, "k": 5}),
    )
    rivals: ClassVar = {"": {"cce": _cce_logsumexp}}

    @staticmethod
    def reference(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, ...]:
        """With the logits of the whole slice."""
        z = float_logits(x, weight)
        logits, token_ids = z.topk(k)
        return logits, token_ids, z.logsumexp(-1), _entropy(z)

    def shapes(self, model: ModelShape, ranks: int, grid: Grid) -> Iterator[Case]:
        for rows in grid.head_rows:
            vocab = -(-model.vocab // ranks)
            yield self.case({"rows": rows, "d": model.d, "V": vocab, "k": TOP_K})

    def make(self, case: Case, device: torch.device) -> Given:
        rows, d, vocab = (case.sizes[name] for name in ("rows", "d", "V"))
        new = New(device, case.dtype)
        weight = new(vocab, d).mul_(d**-0.5)  # logits of size 1
        return {"x": new(rows, d), "weight": weight, "k": case.sizes["k"]}

    def cost(self, case: Case) -> Cost:
        rows, d, vocab, k = (case.sizes[name] for name in ("rows", "d", "V", "k"))
        results = rows * (k * (4 + 8) + 3 * 4)  # logits and ids, and max and two sums
        return Cost(case.dtype.itemsize * (vocab * d + rows * d) + results, 2 * rows * vocab * d)

    def other_impls(self, case: Case) -> dict[str, Impl]:
        # not the whole work: the product alone, which nothing that computes logits beats
        return {"product": lambda given: {"product": given["x"] @ given["weight"].T}}

    def on_rows(self, given: Given, rows: Tensor) -> Given:
        return given | {"x": given["x"][rows]}

    def results(self, impl: Impl, given: Given) -> Results:
        out = impl(given)
        if isinstance(out, HeadStats):
            rows = out.rows
            total = rows.sum_exp.log()
            entropy = total - rows.sum_dev / rows.sum_exp
            out = (rows.logits, rows.token_ids, rows.max + total, entropy)
        return out if isinstance(out, dict) else dict(zip(self.result_names, out, strict=True))

    def truth(self, given: Given) -> Results:
        z = given["x"].double() @ given["weight"].double().T
        logits = z.topk(given["k"]).values
        sums = {"logsumexp": z.logsumexp(-1), "entropy": _entropy(z)}
        return {"logits": logits, **sums, "all_logits": z}

    def plain(self, given: Given) -> Results:
        return self.results(lambda same: head_stats_reference(**same), given)

    def float_slack(self, case: Case, device: torch.device) -> float:
        """Tensor cores truncate, where sums elsewhere round, when they add the products of 16
        columns to the accumulator. A truncation loses up to 1 ulp, half of one on average, and all
        of them lose in the same direction: d / 16 of them in a chain of d columns. Of the row's
        largest value that is d / 16 * 2^-23 / 2, more than FLOAT_SLACK from d 2,700 on.
        """
        slack = tensor_core_slack(case.sizes["d"]) if device.type == "cuda" else 0.0
        return max(FLOAT_SLACK, slack)

    def claims(self) -> list[Claim]:
        many, few = (
            [self._llama_case(rows) for rows in all_rows]
            for all_rows in ((4096, 8192), (64, 16, 1))
        )
        wide, narrow = "head, 4,096 rows or more", "head, up to 64 rows"
        return [
            Claim(f"{wide}: rate over torch.mm's", many, _product_share, 0.75),
            Claim(f"{narrow}: share of measured copy bandwidth", few, copy_share, 0.85),
            Claim(f"{wide}: memory over bf16 logits", many, _memory_share, 0.01, True),
            # logits are small there; a tile of them for each program is what it takes
            Claim(f"{narrow}: extra memory", few, memory_mib, 12, True, unit=" MiB"),
        ]

    def _llama_case(self, rows: int) -> Case:
        model = MODELS["llama-3.1-8b"]
        return self.case({"rows": rows, "d": model.d, "V": model.vocab, "k": TOP_K})

    def sanitize(self, new: New) -> None:
        super().sanitize(new)
        for rows in (1, LENS_TAPS):  # a step without lens, and with one
            x, weight = new(rows, 512), new(2000, 512) * 512**-0.5
            ids = torch.arange(rows, device=new.device)
            target = Target(ids, *target_logits(x, weight, ids).unbind(-1))
            noise = Noise(ids[:1], ids[:1], sample_row=rows - 1)
            stats = head_stats(
                x, weight, k=TOP_K, target=target, rows_per_request=rows, noise=noise
            )
            assert all(x.isfinite().all() for x in stats.tensors().values())

    @property
    def launches(self) -> dict[str, Callable[[torch.device], None]]:
        return {
            "head_few": _few_rows,
            "head_many": _many_rows,
            "head_odd": _odd_columns,
            "target_logits": _target_logits,
            "head_float32": _float32,
        }


def _entropy(z: Tensor) -> Tensor:
    log_probs = z.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def _product_share(rows: dict[str, Row]) -> float:
    return float(rows["product"]["p50_ms"] / rows[OURS]["p50_ms"])


def _memory_share(rows: dict[str, Row]) -> float:
    sizes = dict(word.split("=") for word in rows[OURS]["shape"].split())
    return memory_mib(rows) * 2**20 / (2 * int(sizes["rows"]) * int(sizes["V"]))


def memory_mib(rows: dict[str, Row]) -> float:
    peak = rows[OURS]["peak_extra_bytes"]
    return float("nan") if peak is None else peak / 2**20


def _launch(
    device: torch.device,
    rows: int,
    d: int,
    n_ids: int,
    k: int = TOP_K,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> None:
    """With everything that a lens asks for: targets and KL."""
    vectors = [torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2)]
    target = Target(torch.empty(rows, dtype=torch.int64, device=device), *vectors)
    taps = LENS_TAPS if rows % LENS_TAPS == 0 else 1
    given: dict[str, Any] = {"rows_per_request": taps, "target": target} | options
    x, weight = (torch.empty(n, d, dtype=dtype, device=device) for n in (rows, n_ids))
    head_stats(x, weight, k=k, **given)


def _noise(device: torch.device, n_sampled: int, row: int = 0) -> Noise:
    keys = torch.empty(n_sampled, dtype=torch.int64, device=device)
    return Noise(keys, keys, sample_row=row)


def _few_rows(device: torch.device) -> None:
    """Steps of decoding: every request's last row is sampled from, at a temperature of its own."""
    _launch(device, 8, 4096, 16_032, k=64, noise=_noise(device, 8))
    for rows in (32, 128):
        scale, noise = (
            torch.empty(rows, dtype=torch.float32, device=device),
            _noise(device, rows // 8, 7),
        )
        _launch(device, rows, 4096, 128_256, noise=noise, rows_per_request=8, scale=scale)
    _launch(device, LENS_TAPS, 4096, 128_256, noise=_noise(device, 1, LENS_TAPS - 1))


def _many_rows(device: torch.device) -> None:
    _launch(device, 4096, 4096, 128_256, target=None)
    _launch(device, 81 * 64, 8192, 16_032, rows_per_request=81, k=20)


def _odd_columns(device: torch.device) -> None:
    """Columns that no step divides."""
    for rows in (8, 32, 33, 128, 4096):
        _launch(device, rows, 608, 16_032, noise=_noise(device, 1) if rows <= 128 else None)


def _target_logits(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (8, 32, 33, 128, 4096):
            x, weight = (torch.empty(n, 4096, dtype=dtype, device=device) for n in (rows, 16_032))
            target_logits(x, weight, torch.empty(rows, dtype=torch.int64, device=device))


def _float32(device: torch.device) -> None:
    for rows in (8, 32, 33, 128, 33 * 64):
        _launch(device, rows, 4096, 128_256, dtype=torch.float32)

"""One operation at one shape: implementations are checked against float64, then timed by turns.

    shardlens   what `auto` takes: Triton kernels on CUDA, PyTorch references on a CPU
    eager       the operation in plain PyTorch          compile   the same under torch.compile
    others      PyTorch's own operator, and the extra `rivals`, where there is one for the work
    product     (head) the matrix product alone, for scale

Nothing is timed that does not compute what it should, see `Checker`.

GB/s and TFLOP/s are what the operation must move and compute, see `op.py`, over p50: an
implementation that moves more has that much less. The floor of a case is the longer of bytes over
the measured copy bandwidth and operations over the measured matrix rate; `roofline_share` is floor
over p50. Bytes alone, over p50, are also given as `copy_bandwidth_share`, of that measured
bandwidth, and as `nominal_bandwidth_share`, of the data sheet's, where the card is known. `noise`
is what two timings of ours, taken in turn with the others, differ by.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .op import COMPILED, EAGER, OURS, Case, Cost, Given, Impl, Results, Row, chosen_rows
from .ops import OPS
from .report import bandwidth_shares
from .shapes import default_dtype
from .timing import (
    Rates,
    Run,
    Times,
    interleaved,
    measured_rates,
    peak_extra_bytes,
    set_count,
)

SECONDS_PER_CASE = {"cuda": 0.5, "cpu": 2.0}
SECONDS_FOR_RATES = 2.0
AGAIN = "shardlens again"
LEFT_OUT_WIDTH = 160  # of an error's text
# Liger-Kernel (norm, gated activation) and cut-cross-entropy (log-sum-exp of the head) are Triton,
# quack (norm) is CuTe. All need CUDA; they are called forward only, by what their own modules use.
RIVAL_PACKAGES = ("liger-kernel", "quack-kernels", "cut-cross-entropy")
CHECKED_ROWS = 64
WORST = 2.0  # times the error of the PyTorch expression
MEAN = 1.01
HALF_SLACK = 4 * torch.finfo(torch.float32).eps
RIVAL_RELATIVE = 1e-2  # norm of the error over norm of the truth


class RedCheck(RuntimeError):
    """A result of ours is wrong: there is nothing to report."""


@dataclass
class Bench:
    """The device, its rates, and what was found so far."""

    device: torch.device
    rates: Rates
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # case and implementation -> why
    skipped: list[str] = field(default_factory=list)  # cases that time ran out for

    @classmethod
    def on(cls, device: torch.device) -> Bench:
        return cls(device, measured_rates(device, default_dtype(device), SECONDS_FOR_RATES))

    def drop(self, op: str) -> None:
        """Throw away what was measured of an operation."""
        self.rows = [row for row in self.rows if row["op"] != op]


def rival_versions() -> dict[str, str | None]:
    """The version of each rival package, None where it is not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in RIVAL_PACKAGES}


def rivals_of(case: Case) -> tuple[dict[str, Impl], dict[str, str]]:
    """(rivals that can be imported here, why each other one is left out)."""
    found, left_out = {}, {}
    for name, load in OPS[case.op].rivals.get(case.variant, {}).items():
        try:
            found[name] = load()
        except Exception as error:  # some import much, and fail in their own ways
            left_out[name] = f"cannot be imported: {error}"
    return found, left_out


def impls_of(case: Case, device: torch.device, compiled: bool = True) -> dict[str, Impl]:
    """Ours first. Rivals need CUDA."""
    op = OPS[case.op]
    impls: dict[str, Impl] = {
        OURS: lambda given: op.ours(**given),
        EAGER: lambda given: op.reference(**given),
    }
    if compiled:
        torch._dynamo.reset()  # else, after eight shapes, it would silently run eagerly
        whole = torch.compile(op.reference, fullgraph=True, dynamic=False)
        impls[COMPILED] = lambda given: whole(**given)
    impls |= op.other_impls(case)
    return impls | (rivals_of(case)[0] if device.type == "cuda" else {})


@torch.no_grad()
def measure(
    bench: Bench, case: Case, seconds: float | None = None, compiled: bool = True
) -> list[Row]:
    """Check and time one case; its rows, also added to `bench`. Raises RedCheck."""
    device, op = bench.device, OPS[case.op]
    cost = op.cost(case)
    sets = [op.make(case, device) for _ in range(set_count(cost.bytes, device))]
    impls = _green_impls(bench, case, impls_of(case, device, compiled), sets[0])
    peaks = {name: peak_extra_bytes(impl, sets[0], device) for name, impl in impls.items()}
    timed: dict[str, Run] = {**impls, AGAIN: impls[OURS]}
    times = interleaved(timed, sets, device, seconds or SECONDS_PER_CASE[device.type])
    noise = abs(times[AGAIN].p50_ms / times[OURS].p50_ms - 1)
    rows = [
        _names(case)
        | {"impl": name}
        | _figures(times[name], cost, bench.rates)
        | _shares(cost.bytes / times[name].p50_ms * 1e3, bench)
        | {"peak_extra_bytes": peaks[name], "noise": round(noise, 4)}
        for name in impls
    ]
    bench.rows.extend(rows)
    return rows


def _green_impls(bench: Bench, case: Case, impls: dict[str, Impl], given: Given) -> dict[str, Impl]:
    """Those whose results are right. A rival that fails or is wrong is left out, and named."""
    for name, why in rivals_of(case)[1].items():
        bench.left_out[f"{case.op} {case.variant}: {name}"] = why
    checker = Checker(case, given)
    green = {}
    for name, impl in impls.items():
        try:
            problem = checker.problem(name, impl)
        except Exception as error:
            if name == OURS:
                raise
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            green[name] = impl
        elif name == OURS:
            raise RedCheck(f"{case.label}: {problem}")
        else:
            bench.left_out[f"{case.label}: {name}"] = problem[:LEFT_OUT_WIDTH]
    return green


def _names(case: Case) -> Row:
    return {
        "op": case.op,
        "variant": case.variant,
        "shape": case.shape,
        "used_by": " ".join(case.used_by),
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def _figures(times: Times, cost: Cost, rates: Rates) -> Row:
    seconds = times.p50_ms / 1e3
    moving = cost.bytes / rates.copy_bytes_per_s
    computing = cost.operations / rates.matrix_flop_per_s
    return {
        "how": times.how,
        "p20_ms": round(times.p20_ms, 6),
        "p50_ms": round(times.p50_ms, 6),
        "p80_ms": round(times.p80_ms, 6),
        "rounds": times.rounds,
        "bytes": cost.bytes,
        "operations": cost.operations,
        "gb_per_s": round(cost.bytes / seconds / 1e9, 3),
        "tflop_per_s": round(cost.operations / seconds / 1e12, 6),
        "bound": "bytes" if moving >= computing else "operations",
        "roofline_share": round(max(moving, computing) / seconds, 4),
    }


def _shares(bytes_per_s: float, bench: Bench) -> Row:
    shares = bandwidth_shares(bytes_per_s, bench.rates.copy_bytes_per_s, bench.device)
    return {name: None if share is None else round(share, 4) for name, share in shares.items()}


class Checker:
    """The truth for one set of arguments, to hold several implementations against.

    Errors are relative to the largest value of their row, so that rows of large values excuse
    nothing elsewhere. A bf16 result of ours may err, on average, as the same-dtype PyTorch
    expression does; a single number may err twice as much as that expression at its worst, since
    where two roundings follow each other, the last bit of a sum before them can turn both. float32
    results are held to float32 sums in any order, see `Op.float_slack`. A rival, which may round in
    another order, may miss the truth by RIVAL_RELATIVE in all.
    """

    def __init__(self, case: Case, given: Given) -> None:
        self._op, self._given = OPS[case.op], given
        device = next(x.device for x in given.values() if isinstance(x, Tensor))
        self._float_slack = self._op.float_slack(case, device)
        has_rows = "rows" in case.sizes
        self._rows = chosen_rows(case.sizes["rows"], CHECKED_ROWS) if has_rows else None
        part = given if self._rows is None else self._op.on_rows(given, self._rows)
        self._truth, self._plain = self._op.truth(part), self._op.plain(part)

    def problem(self, name: str, impl: Impl) -> str | None:
        """The first thing wrong with an implementation's results; None if nothing is."""
        if name != OURS:
            return self._rival_problem(self._checked(self._op.results(impl, self._given)))
        with _poisoned_memory():
            found, again = (self._op.results(impl, self._given) for _ in range(2))
        for result in self._op.result_names:
            if not torch.equal(found[result], again[result]):  # NaN, too, is unequal
                return f"{result} differs between two runs, or is NaN"
        return self._our_problem(self._checked(found))

    def _checked(self, results: Results) -> Results:
        if self._rows is None:
            return results
        return {name: value[self._rows] for name, value in results.items()}

    def _our_problem(self, found: Results) -> str | None:
        plain = dict(self._plain)
        if "token_ids" in found:
            for results in (found, plain):
                logits_of_ids = self._truth["all_logits"].gather(-1, results["token_ids"])
                results["token_ids"] = logits_of_ids
        for name in self._op.result_names:
            truth = self._truth["logits" if name == "token_ids" else name]
            if problem := _excess(found[name], plain[name], truth, self._float_slack):
                return f"{name} {problem}"
        return None

    def _rival_problem(self, found: Results) -> str | None:
        for name, value in found.items():
            if name != "token_ids":
                truth = self._truth["all_logits" if name == "product" else name]
                error = (value.double() - truth).norm() / truth.norm()
                if not error <= RIVAL_RELATIVE:  # NaN is not either
                    return f"{name} misses float64 by {error.item():.2g} of its norm"
        return None


def _excess(found: Tensor, plain: Tensor, truth: Tensor, float_slack: float) -> str | None:
    """By how much `found` is worse than it may be; None if it is not."""
    if found.ndim == 1:
        found, plain, truth = found[:, None], plain[:, None], truth[:, None]
    scale = truth.abs().amax(-1, keepdim=True)
    error, allowed = ((x.double() - truth).abs() / scale for x in (found, plain))
    slack = float_slack if found.dtype in (torch.float32, torch.float64) else HALF_SLACK
    worst, allowed_worst = error.max().item(), WORST * allowed.max().item() + slack
    mean, allowed_mean = error.mean().item(), MEAN * allowed.mean().item() + slack
    if worst <= allowed_worst and mean <= allowed_mean:
        return None
    return (
        f"misses float64 by {worst:.3g} at most and {mean:.3g} on average, "
        f"where {allowed_worst:.3g} and {allowed_mean:.3g} are allowed"
    )


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that have no deterministic version
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)

"""One operation at one shape: implementations are checked against float64, then timed by turns.

    shardlens   what `auto` takes: Triton kernels on CUDA, PyTorch references on a CPU
    eager       the operation in plain PyTorch          compile   the same under torch.compile
    others      PyTorch's own operator, and the extra `rivals`, where there is one for the work
    product     (head) the matrix product alone, for scale

Nothing is timed that does not compute what it should, see `Checker`.

    python -m shardlens.bench.kernels

makes small calls with all that each operation can be asked, for compute-sanitizer.

GB/s and TFLOP/s are what the operation must move and compute, see `op.py`, over p50: an
implementation that moves more has that much less. The floor of a case is the longer of bytes over
the measured copy bandwidth and operations over the measured matrix rate; `roofline_share` is floor
over p50. Bytes alone, over p50, are also given as `copy_bandwidth_share`, of that measured
bandwidth, and as `nominal_bandwidth_share`, of the data sheet's, where the card is known. `noise`
is what two timings of ours, taken in turn with the others, differ by.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..model.load import default_device
from .models import GRIDS, default_dtype
from .op import COMPILED, EAGER, OURS, Case, Checker, Cost, Given, Impl, New, Op, Row
from .op_attention import AttentionOp
from .op_head import HeadOp
from .op_rmsnorm import NormOp
from .op_rope import RopeOp
from .op_swiglu import SwigluOp
from .report import bandwidth_shares
from .timing import (
    Rates,
    Run,
    Times,
    interleaved,
    measured_rates,
    peak_extra_bytes,
    set_count,
    synchronize,
)

OPS: dict[str, Op] = {
    op.name: op for op in (NormOp(), SwigluOp(), RopeOp(), AttentionOp(), HeadOp())
}

SECONDS_PER_CASE = {"cuda": 0.5, "cpu": 2.0}
SECONDS_FOR_RATES = 2.0
AGAIN = "shardlens again"
LEFT_OUT_WIDTH = 160  # of an error's text
# Liger-Kernel (norm, gated activation) and cut-cross-entropy (log-sum-exp of the head) are Triton,
# quack (norm) is CuTe. All need CUDA; they are called forward only, by what their own modules use.
RIVAL_PACKAGES = ("liger-kernel", "quack-kernels", "cut-cross-entropy")


def cases(
    grid: str, ops: Iterable[str] = tuple(OPS), dtype: torch.dtype = torch.bfloat16
) -> list[Case]:
    """The distinct cases of a grid, by operation. Raises ValueError for an unknown name."""
    if grid not in GRIDS:
        raise ValueError(f"grid {grid}: there are {', '.join(GRIDS)}")
    ops = tuple(ops)
    for op in ops:
        if op not in OPS:
            raise ValueError(f"operation {op}: there are {', '.join(OPS)}")
    return [case for op in ops for case in OPS[op].cases(GRIDS[grid], dtype)]


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
    """The implementations that are right. A rival that fails or is wrong is left out, and named."""
    for name, why in rivals_of(case)[1].items():
        bench.left_out[f"{case.op} {case.variant}: {name}"] = why
    checker = Checker(OPS[case.op], case, given)
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


@torch.no_grad()
def main() -> None:
    device = default_device()
    torch.manual_seed(0)
    for op in OPS.values():
        op.sanitize(New(device, default_dtype(device)))
        synchronize(device)
    print("done")


if __name__ == "__main__":
    main()

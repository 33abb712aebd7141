"""A benchmark of one operation: inputs at a shape, cost, implementations, truth, claims.

Each operation has a file, `op_*.py`, with everything that is asked of it: `bench kernels` times
it, `bench.compiled` compiles what it launches, `bench.gpu` decides what is claimed of it.

Cost: every input read once, every output written once, however an implementation does it; a
product of [n, m] and [m, k] is 2 n m k operations, and what is done per number is counted as one or
a few. Inputs are random, values near 1. An implementation takes a dict of arguments, see `Op.make`.

The truth is the operation in float64 without roundings on the way.
"""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import MODES, Edits
from .models import MODELS, Grid, ModelShape

Given = dict[str, Any]
Results = dict[str, Tensor]
Impl = Callable[[Given], Any]
Row = dict[str, Any]  # the figures of one implementation at one case
OURS, EAGER, COMPILED = "shardlens", "eager", "compile"
CHECKED_ROWS = 64
WORST = 2.0  # times the error of the PyTorch expression
MEAN = 1.01
HALF_SLACK = 4 * torch.finfo(torch.float32).eps
RIVAL_RELATIVE = 1e-2  # norm of the error over norm of the truth
FLOAT_SLACK = 1e-5  # sums of some thousand float32 numbers, whose roundings mostly cancel
EPS = 1e-5
TABLE_VECTORS = 8


@dataclass
class Case:
    """One operation at one shape. Shapes that models or rank counts share are one case."""

    op: str
    sizes: dict[str, int]
    variant: str = ""
    dtype: torch.dtype = torch.bfloat16
    used_by: list[str] = field(default_factory=list)  # "model/ranks"

    @property
    def shape(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())

    @property
    def label(self) -> str:
        return label(self.op, self.variant, self.shape)


def label(op: str, variant: str, shape: str) -> str:
    """The name of a case, for people and as a key."""
    return " ".join(filter(None, (op, variant, shape)))


@dataclass(frozen=True)
class Cost:
    """The least that the work must move and compute."""

    bytes: int
    operations: int


@dataclass(frozen=True)
class Claim:
    """`figure` of every case must reach the target (or, where `below`, stay under it).

    `figure` is given the case's rows by implementation.
    """

    text: str
    cases: list[Case]
    figure: Callable[[dict[str, Row]], float]
    target: float
    below: bool = False
    compiled: bool = False  # torch.compile is among the rivals
    unit: str = "%"


class Op(ABC):
    """One operation. `reference` is the eager implementation, and what torch.compile is given."""

    name: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    result_names: tuple[str, ...]
    tests: tuple[str, ...]  # files of tests/kernels that vouch for its figures
    odd_cases: tuple[Case, ...]  # that no tile divides, checked before anything is claimed
    compiled: ClassVar[Mapping[str, tuple[Case, ...]]] = {}  # by a name, what to compile together
    # By variant, other people's kernels for the same work: names, and how each is imported.
    rivals: ClassVar[Mapping[str, Mapping[str, Callable[[], Impl]]]] = {}

    @abstractmethod
    def shapes(self, model: ModelShape, ranks: int, grid: Grid) -> Iterator[Case]:
        """The shapes at which one rank of `ranks` runs the operation."""

    @abstractmethod
    def make(self, case: Case, device: torch.device) -> Given:
        """Fresh random arguments."""

    @abstractmethod
    def cost(self, case: Case) -> Cost:
        """The bytes that the work must move, and its operations."""

    def claims(self) -> list[Claim]:
        """The claims about the operation on a GPU."""
        return []

    def other_impls(self, case: Case) -> dict[str, Impl]:
        """PyTorch's own operator for the same work, where it has one."""
        return {}

    def on_rows(self, given: Given, rows: Tensor) -> Given:
        """The arguments for some of the rows; all of them where rows are not apart."""
        return given

    def results(self, impl: Impl, given: Given) -> Results:
        """The results of an implementation, by name."""
        out = impl(given)
        parts = out if isinstance(out, tuple) else (out,)
        return dict(zip(self.result_names, parts, strict=False))

    def truth(self, given: Given) -> Results:
        """The results in float64."""
        return self.results(lambda exact: self.reference(**exact), _double(given))

    def plain(self, given: Given) -> Results:
        """The results of the same-dtype PyTorch expression."""
        return self.results(lambda same: self.reference(**same), given)

    def float_slack(self, case: Case, device: torch.device) -> float:
        """The error allowed to a float32 result, beyond that of the PyTorch expression."""
        return FLOAT_SLACK

    @property
    def launches(self) -> dict[str, Callable[[torch.device], None]]:
        """By a name, calls that launch each kernel as models do. On meta tensors nothing runs."""
        return {name: partial(self._launch, cases) for name, cases in self.compiled.items()}

    def _launch(self, cases: Iterable[Case], device: torch.device) -> None:
        for case in cases:
            self.ours(**self.make(case, device))

    def sanitize(self, new: New) -> None:
        """Small calls with all that can be asked, for compute-sanitizer."""
        for case in self.odd_cases:
            self.ours(**self.make(replace(case, dtype=new.dtype), new.device))

    def cases(self, grid: Grid, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
        """The distinct cases of a grid; `used_by` names the models and ranks of each."""
        found: dict[str, Case] = {}
        for name in grid.models:
            for ranks in grid.ranks:
                for case in self.shapes(MODELS[name], ranks, grid):
                    case.dtype = dtype
                    found.setdefault(case.label, case).used_by.append(f"{name}/{ranks}")
        return list(found.values())

    def case(self, sizes: dict[str, int], variant: str = "") -> Case:
        return Case(self.name, sizes, variant)


@dataclass(frozen=True)
class New:
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


def attribute(module: str, name: str) -> Any:
    """An attribute of another package's module, imported when it is asked for."""
    return getattr(importlib.import_module(module), name)


def copy_share(rows: dict[str, Row]) -> float:
    """Ours, as a share of the bandwidth of a measured copy, where moving bytes is the floor."""
    return float(rows[OURS]["copy_bandwidth_share"])


def rival_ratio(rows: dict[str, Row]) -> float:
    """The fastest other implementation's time over ours, plus the noise of two timings of ours."""
    rivals = [row["p50_ms"] for name, row in rows.items() if name != OURS]
    return float(min(rivals) / rows[OURS]["p50_ms"] + rows[OURS]["noise"])


def chosen_rows(n_rows: int) -> Tensor:
    """At most CHECKED_ROWS row indices, from first to last, evenly spaced."""
    n = min(n_rows, CHECKED_ROWS)
    return torch.arange(n) * (n_rows - 1) // max(1, n - 1)


def _double(given: Given) -> Given:
    def wide(value: Any) -> Any:
        if isinstance(value, Edits):
            return replace(value, vectors=value.vectors.double())
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if is_float else value

    return {name: wide(value) for name, value in given.items()}


class Checker:
    """The truth for one set of arguments, to hold several implementations against.

    Errors are relative to the largest value of their row, so that rows of large values excuse
    nothing elsewhere. A bf16 result of ours may err, on average, as the same-dtype PyTorch
    expression does; a single number may err twice as much as that expression at its worst, since
    where two roundings follow each other, the last bit of a sum before them can turn both. float32
    results are held to float32 sums in any order, see `Op.float_slack`. A rival, which may round in
    another order, may miss the truth by RIVAL_RELATIVE in all.
    """

    def __init__(self, op: Op, case: Case, given: Given) -> None:
        self._op, self._given = op, given
        device = next(x.device for x in given.values() if isinstance(x, Tensor))
        self._float_slack = op.float_slack(case, device)
        self._rows = chosen_rows(case.sizes["rows"]) if "rows" in case.sizes else None
        part = given if self._rows is None else op.on_rows(given, self._rows)
        self._truth, self._plain = op.truth(part), op.plain(part)

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
                results["token_ids"] = self._truth["all_logits"].gather(-1, results["token_ids"])
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

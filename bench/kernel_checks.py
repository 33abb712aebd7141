"""Whether an arm computes what it should: nothing is timed that does not.

Errors are relative to the largest value of their row, so that rows of large values excuse nothing
elsewhere. A bf16 result of ours may err, on average, as the same-dtype PyTorch expression does; a
single number may err twice as much as that expression at its worst, since where two roundings
follow each other, the last bit of a sum before them can turn both. float32 results are held to
float32 sums in any order; those of the head, to such sums on tensor cores: see `float_slack`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.rounding import tensor_core_slack
from .kernel_arms import BY_NAME, CHECKED_ROWS, OURS, Given, Results
from .rivals import Arm
from .shapes import Case

WORST = 2.0  # times the error of the PyTorch expression
MEAN = 1.01
HALF_SLACK = 4 * torch.finfo(torch.float32).eps
FLOAT_SLACK = 1e-5  # sums of some thousand float32 numbers, whose roundings mostly cancel
RIVAL_RELATIVE = 1e-2  # norm of the error over norm of the truth


class RedCheck(RuntimeError):
    """A result of ours is wrong: there is nothing to report."""


def float_slack(case: Case, device: torch.device) -> float:
    """What a float32 result may miss, beyond the PyTorch expression's own error.

    Tensor cores truncate, where sums elsewhere round, when they add the products of 16 columns to
    the accumulator. A truncation loses up to 1 ulp, half of one on average, and all of them lose
    in the same direction: d / 16 of them in a chain of d columns. Of the row's largest value that
    is d / 16 * 2^-23 / 2, more than FLOAT_SLACK from d 2,700 on.
    """
    if case.op != "head_stats" or device.type != "cuda":
        return FLOAT_SLACK
    return max(FLOAT_SLACK, tensor_core_slack(case.sizes["d"]))


class Checker:
    """The truth for one set of arguments, to hold several arms against."""

    def __init__(self, case: Case, given: Given) -> None:
        self._op, self._given = BY_NAME[case.op], given
        device = next(x.device for x in given.values() if isinstance(x, Tensor))
        self._float_slack = float_slack(case, device)
        self._rows: Tensor | None = None
        if "rows" in case.sizes:
            n_rows = case.sizes["rows"]
            n_checked = min(n_rows, CHECKED_ROWS)
            self._rows = torch.arange(n_checked) * (n_rows - 1) // max(1, n_checked - 1)
        part = given if self._rows is None else self._op.on_rows(given, self._rows)
        self._truth, self._plain = self._op.truth(part), self._op.plain(part)

    def problem(self, name: str, arm: Arm) -> str | None:
        """What is wrong with an arm's results; None if nothing is."""
        if name != OURS:
            return self._rival_problem(self._checked(self._op.results(arm, self._given)))
        with _poisoned_memory():
            found, again = (self._op.results(arm, self._given) for _ in range(2))
        for result in self._op.names:
            if not torch.equal(found[result], again[result]):  # NaN, too, is unequal
                return f"{result} differs between two runs, or is NaN"
        return self._our_problem(self._checked(found))

    def _checked(self, results: Results) -> Results:
        if self._rows is None:
            return results
        return {name: value[self._rows] for name, value in results.items()}

    def _our_problem(self, found: Results) -> str | None:
        plain = dict(self._plain)
        if "ids" in found:
            for results in (found, plain):
                results["ids"] = self._truth["logits"].gather(-1, results["ids"])
        for name in self._op.names:
            truth = self._truth["values" if name == "ids" else name]
            if problem := _excess(found[name], plain[name], truth, self._float_slack):
                return f"{name} {problem}"
        return None

    def _rival_problem(self, found: Results) -> str | None:
        for name, value in found.items():
            if name != "ids":
                truth = self._truth["logits" if name == "product" else name]
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

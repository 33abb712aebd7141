"""Stage claims: the operations, checked and measured beside their rivals at the claims' shapes.

First the checks: the tests of the kernels, one process a file, and beside them checks at odd
shapes here; every shape that is timed is checked once more before it. An operation with a red test
or check is not measured, and what was measured of it is thrown away; all others are. Then the
shapes that the claims name, then the rest of the full grid as far as the time goes.

Without a GPU the same steps run on shrunken shapes and decide nothing: a rehearsal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..model.load import default_device
from . import gpu_suite
from .kernel_report import paths_text, plot, print_case, rates_and_noise
from .kernels import Bench, Checker, RedCheck, impls_of, measure
from .op import OURS, Case, Claim, Row, label
from .ops import OPS, cases, claims, shrunken
from .report import Journal, first_line
from .shapes import default_dtype
from .timing import one_thread, synchronize

TEST_SHARE = 0.4  # of the time, at most, for the tests
REHEARSAL_SECONDS = 0.05  # of a case


@dataclass(frozen=True)
class Verdict:
    """The worst figure of the cases that were measured, and their number."""

    text: str
    target: str
    figure: float | None
    unit: str
    worst_case: str
    measured: int
    of: int
    # None: on a CPU, which decides nothing; or not all were measured, and those that were are well
    met: bool | None


def run(journal: Journal, deadline: float, truth: Path | None) -> None:
    """truth: the file of a stage that ran the tests on this very code, if there is one."""
    device = default_device()
    print(f"{paths_text(device)}. Checks first.", flush=True)
    with one_thread():
        with journal.step("checks"):
            check(journal, device, deadline, truth)
        made = claims(rehearsed=device.type == "cpu")
        with journal.step("measuring"):
            bench = Bench.on(device)
            journal.record(paths=paths_text(device), decides=device.type == "cuda")
            measure_green(journal, bench, made, deadline)
            _print_end(journal, bench, made)
            plot(bench.rows, paths_text(device), journal.path.with_suffix(".png"))


def check(journal: Journal, device: torch.device, deadline: float, truth: Path | None) -> None:
    files = gpu_suite.kernel_files()
    known = gpu_suite.results_of(truth, files)
    with gpu_suite.TestRun([] if known is not None else files) as tests:
        for op, problem in odd_checks(device).items():
            journal.add_red(op, problem)
        if known is None:
            now = time.monotonic()
            known = tests.wait(now + TEST_SHARE * (deadline - now), gpu_suite.print_result)
    journal.record(tests=known)
    for op, failed in gpu_suite.red_of(known).items():
        journal.add_red(op, *failed)
    for op in OPS:
        print(f"check {op}: {'RED' if op in journal.content['red'] else 'green'}", flush=True)


@torch.no_grad()
def odd_checks(device: torch.device) -> dict[str, str]:
    """The first problem at odd shapes, by operation."""
    red: dict[str, str] = {}
    for case in (case for op in OPS.values() for case in op.odd_cases):
        case = replace(case, dtype=default_dtype(device))
        try:
            given = OPS[case.op].make(case, device)
            ours = impls_of(case, device, compiled=False)[OURS]
            problem = Checker(case, given).problem(OURS, ours)
        except Exception as error:  # a kernel that does not compile, say
            problem = first_line(error)
        if problem is not None:
            red.setdefault(case.op, f"{case.label}: {problem}")
    return red


def planned(made: list[Claim], on_cpu: bool) -> Iterator[tuple[Case, bool]]:
    """Each case once, with whether torch.compile is timed too: it compiles for seconds."""
    rest = [shrunken(case) for case in cases("full")] if on_cpu else cases("full")
    compiled = {case.label for claim in made if claim.compiled for case in claim.cases}
    seen = set()
    for case in [*(case for claim in made for case in claim.cases), *rest]:
        if case.label not in seen:
            seen.add(case.label)
            yield case, case.label in compiled


def measure_green(journal: Journal, bench: Bench, made: list[Claim], deadline: float) -> None:
    """All planned cases of green operations, till the deadline; the file has each at once."""
    on_cpu = bench.device.type == "cpu"
    for case, compiled in planned(made, on_cpu):
        if case.op in journal.content["red"]:
            continue
        if time.monotonic() > deadline:
            bench.skipped.append(case.label)
            continue
        journal.now(case.label)
        try:
            seconds = REHEARSAL_SECONDS if on_cpu else None
            print_case(case, measure(bench, case, seconds, compiled=compiled and not on_cpu))
        except Exception as error:
            is_check = isinstance(error, RedCheck)
            named = str(error) if is_check else f"{case.label}: {first_line(error)}"
            journal.add_red(case.op, named)
            bench.drop(case.op)
            if not _answers(bench.device):
                print("the device has stopped answering: nothing further is measured")
                deadline = 0.0
        _keep(journal, bench, made)
    _keep(journal, bench, made)


def _keep(journal: Journal, bench: Bench, made: list[Claim]) -> None:
    found = verdicts(made, bench.rows, journal.content["decides"])
    journal.record(
        **rates_and_noise(bench),
        claims=[asdict(verdict) for verdict in found],
        rows=bench.rows,
        left_out=bench.left_out,
        skipped=bench.skipped,
    )


def _answers(device: torch.device) -> bool:
    """After some errors of a kernel every call of the process fails, whosever it is."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def _print_end(journal: Journal, bench: Bench, made: list[Claim]) -> None:
    for what, why in bench.left_out.items():
        print(f"left out: {what}: {why}")
    for op, found in journal.content["red"].items():
        print(f"left out: {op}: {'; '.join(found)}")
    if bench.skipped:
        print(f"out of time: {len(bench.skipped)} cases skipped, first {bench.skipped[0]}")
    rates = rates_and_noise(bench)
    print(
        f"copy {rates['copy_gb_per_s']} GB/s, matrix product {rates['matrix_tflop_per_s']} "
        f"TFLOP/s, noise {rates['noise_median']} (median), {rates['noise_worst']} (worst)"
    )
    print_verdicts(verdicts(made, bench.rows, journal.content["decides"]))


def verdicts(made: Sequence[Claim], rows: Sequence[Row], decides: bool) -> list[Verdict]:
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        name = label(row["op"], row["variant"], row["shape"])
        by_case.setdefault(name, {})[row["impl"]] = row
    found = [_verdict(claim, by_case) for claim in made]
    return found if decides else [replace(verdict, met=None) for verdict in found]


def _verdict(claim: Claim, by_case: dict[str, dict[str, Row]]) -> Verdict:
    labels = list(dict.fromkeys(case.label for case in claim.cases))
    figures = {label: claim.figure(by_case[label]) for label in labels if label in by_case}
    bound = f"{claim.target:.0%}" if claim.unit == "%" else f"{claim.target:g}{claim.unit}"
    target = f"{'below' if claim.below else 'at least'} {bound}"
    if not figures:
        return Verdict(claim.text, target, None, claim.unit, "", 0, len(labels), None)
    worst = (max if claim.below else min)(figures, key=lambda label: figures[label])
    figure = figures[worst]
    reached = figure < claim.target if claim.below else figure >= claim.target
    met = reached if not reached or len(figures) == len(labels) else None
    measured = len(figures)
    figure = round(figure, 5)
    return Verdict(claim.text, target, figure, claim.unit, worst, measured, len(labels), met)


def print_verdicts(found: Sequence[Verdict]) -> None:
    for verdict in found:
        word = {True: "met", False: "NOT MET", None: "not decided"}[verdict.met]
        figure = "-"
        if verdict.figure is not None:
            is_share = verdict.unit == "%"
            figure = f"{verdict.figure:.2%}" if is_share else f"{verdict.figure:.2f}{verdict.unit}"
        print(
            f"{verdict.text:80} {figure:>10}  {verdict.target:14} "
            f"{word:12} {verdict.measured} of {verdict.of}  "
            f"{verdict.worst_case if verdict.of > 1 else ''}"
        )

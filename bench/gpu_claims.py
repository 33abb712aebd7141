"""Stage claims: the operations, checked and measured beside their rivals at the claims' shapes.

First the checks: the tests of the kernels, one process per file, and beside them checks at odd
shapes here; every shape that is timed is checked once more before it. An operation with a red test
or check is not measured, and what was measured of it is thrown away; all others are. Then the
shapes that the claims name, then the rest of the full grid as far as the time goes.

Without a GPU the same steps run on shrunken shapes and decide nothing: a rehearsal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..model.load import default_device
from .kernel_report import paths_text, plot, print_case, print_rates, rates_and_noise
from .kernels import OPS, Bench, RedCheck, cases, impls_of, measure
from .models import default_dtype
from .op import OURS, Case, Checker, Claim, Row, label
from .processes import kernel_files, run_tests
from .report import Journal, first_line, print_verdicts, verdict
from .timing import one_thread, synchronize

REHEARSAL_SECONDS = 0.05  # of a case
# Sizes of a case that a CPU does in no time.
REHEARSED = {"rows": 64, "d": 128, "f": 256, "V": 2048, "H": 4, "K": 2, "T": 16, "S": 160}


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
    def odd() -> None:
        for op, problem in odd_checks(device).items():
            journal.add_red(op, problem)

    run_tests(journal, kernel_files(), deadline, truth, meanwhile=odd)
    for op in OPS:
        print(f"check {op}: {'RED' if op in journal.content['red'] else 'green'}", flush=True)


@torch.no_grad()
def odd_checks(device: torch.device) -> dict[str, str]:
    """The first problem at odd shapes, by operation."""
    red: dict[str, str] = {}
    for given in (case for op in OPS.values() for case in op.odd_cases):
        op, case = OPS[given.op], replace(given, dtype=default_dtype(device))
        try:
            ours = impls_of(case, device, compiled=False)[OURS]
            problem = Checker(op, case, op.make(case, device)).problem(OURS, ours)
        except Exception as error:  # a kernel that does not compile, say
            problem = first_line(error)
        if problem is not None:
            red.setdefault(case.op, f"{case.label}: {problem}")
    return red


def claims(rehearsed: bool) -> list[Claim]:
    """All claims, fewest cases first, so that as many as possible are decided in the time.

    rehearsed: at shapes that a CPU does in no time.
    """
    made = sorted(
        (claim for op in OPS.values() for claim in op.claims()), key=lambda claim: len(claim.cases)
    )
    if not rehearsed:
        return made
    return [replace(claim, cases=[shrunken(case) for case in claim.cases]) for claim in made]


def shrunken(case: Case) -> Case:
    sizes = {name: min(size, REHEARSED.get(name, size)) for name, size in case.sizes.items()}
    return replace(case, sizes=sizes, dtype=torch.float32)


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
    journal.record(
        **rates_and_noise(bench),
        claims=verdicts(made, bench.rows, journal.content["decides"]),
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
    print_rates(bench)
    for op, found in journal.content["red"].items():
        print(f"left out: {op}: {'; '.join(found)}")
    if bench.skipped:
        print(f"out of time: {len(bench.skipped)} cases skipped, first {bench.skipped[0]}")
    print_verdicts(verdicts(made, bench.rows, journal.content["decides"]))


def verdicts(made: Sequence[Claim], rows: Sequence[Row], decides: bool) -> list[dict[str, Any]]:
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        name = label(row["op"], row["variant"], row["shape"])
        by_case.setdefault(name, {})[row["impl"]] = row
    return [_verdict(claim, by_case, decides) for claim in made]


def _verdict(claim: Claim, by_case: dict[str, dict[str, Row]], decides: bool) -> dict[str, Any]:
    """The verdict on the worst figure of the cases that were measured."""
    labels = list(dict.fromkeys(case.label for case in claim.cases))
    figures = {label: claim.figure(by_case[label]) for label in labels if label in by_case}
    worst = (max if claim.below else min)(figures, key=lambda label: figures[label], default=None)
    figure = None if worst is None else figures[worst]
    found = verdict(claim.text, figure, claim.target, claim.below, claim.unit)
    if not decides or (found["met"] and len(figures) < len(labels)):
        found["met"] = None  # the cases that are missing may still miss the target
    return found | {"worst_case": worst, "measured": len(figures), "of": len(labels)}

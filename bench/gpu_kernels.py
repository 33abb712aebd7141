"""Stage claims: the kernels, checked and measured beside their rivals at the shapes of the claims.

First the checks: the tests of the kernels, one process a file, and beside them checks at odd
shapes here; every shape that is timed is checked once more before it. An operation with a red test
or check is not measured, and what was measured of it is thrown away; all others are. Then the
shapes that the claims name, then the rest of the full grid as far as the time goes.

Without a GPU the same steps run on shrunken shapes and decide nothing: a rehearsal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..model.load import default_device
from . import gpu_suite
from .gpu_claims import Claim, claims, print_verdicts, shrunken, verdicts
from .gpu_journal import Journal, first_line
from .kernel_arms import BY_NAME, DTYPES, OURS
from .kernel_checks import Checker, RedCheck
from .kernel_plot import plot
from .kernels import Bench, arms_of, measure, paths_text, print_case, rates_and_noise
from .shapes import OPS, Case, cases
from .timing import one_thread, synchronize

TEST_SHARE = 0.4  # of the time, at most, for the tests
ODD_CASES = [
    Case("rmsnorm_steer", {"rows": 123, "d": 507}, "norm"),
    Case("rmsnorm_steer", {"rows": 1, "d": 4100}, "residual"),
    Case("rmsnorm_steer", {"rows": 123, "d": 5120}, "edits"),
    Case("swiglu", {"rows": 7, "f": 1217}),
    Case("rope_qk", {"B": 3, "T": 5, "H": 5, "K": 1, "D": 96, "S": 41}, "plain"),
    Case("rope_qk", {"B": 2, "T": 3, "H": 6, "K": 2, "D": 128, "S": 50}, "normed"),
    Case("decode_attention", {"B": 3, "H": 5, "K": 1, "D": 96, "S": 507}),
    Case("decode_attention", {"B": 1, "H": 8, "K": 8, "D": 128, "S": 1}),
    Case("head_stats", {"rows": 1, "d": 507, "V": 509, "k": 3}),
    Case("head_stats", {"rows": 123, "d": 96, "V": 4099, "k": 5}),
]


def run(journal: Journal, deadline: float, truth: Path | None) -> None:
    """truth: the file of a stage that ran the tests on this very code, if there is one."""
    device = default_device()
    print(f"{paths_text(device)}. Checks first.", flush=True)
    with one_thread():
        with journal.step("checks"):
            check(journal, device, deadline, truth)
        made = claims(shrink=device.type == "cpu")
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
    """What is red at odd shapes, by operation."""
    red: dict[str, str] = {}
    for case in ODD_CASES:
        case = replace(case, dtype=DTYPES[device.type])
        try:
            given = BY_NAME[case.op].make(case, device)
            ours = arms_of(case, device, compiled=False)[OURS]
            problem = Checker(case, given).problem(OURS, ours)
        except Exception as error:  # a kernel that does not compile, say
            problem = first_line(error)
        if problem is not None:
            red.setdefault(case.op, f"{case.label}: {problem}")
    return red


def planned(made: list[Claim], on_cpu: bool) -> Iterator[tuple[Case, bool]]:
    """Each case once, with whether torch.compile is timed too: it compiles for seconds."""
    rest = [shrunken(case) for case in cases("full", OPS)] if on_cpu else cases("full", OPS)
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
            seconds = 0.05 if on_cpu else None
            print_case(case, measure(bench, case, seconds, compiled=compiled and not on_cpu))
        except Exception as error:
            is_check = isinstance(error, RedCheck)
            named = str(error) if is_check else f"{case.label}: {first_line(error)}"
            journal.add_red(case.op, named)
            bench.drop(case.op)
            if not _answers(bench.device):
                print("the device answers no more: nothing further is measured")
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

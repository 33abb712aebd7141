"""The kernels' claims on a GPU, checked and measured in one call of some minutes.

    python -m shardlens.bench.gpu [--seconds 420] [--out FOLDER]

First the checks: the tests of the kernels, one process a file, and beside them checks at odd
shapes here; every shape that is timed is checked once more before it. An operation with a red
check is not measured, and what was measured of it is thrown away. Then the shapes that the claims
name, then the rest of the full grid as far as the time goes. Last a table of the claims and one
JSON line; all figures go to FOLDER/gpu.{json,csv,png}. Exit code 1 if a check was red.

Without a GPU the same steps run on shrunken shapes and decide nothing: a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..model.load import default_device
from .gpu_claims import Claim, claims, print_verdicts, shrunken, verdicts
from .gpu_suite import TestRun
from .kernel_arms import BY_NAME, DTYPES, OURS
from .kernel_checks import Checker, RedCheck
from .kernel_plot import plot
from .kernels import (
    Bench,
    arms_of,
    measure,
    paths_text,
    print_case,
    summary,
    write_csv,
)
from .report import RESULTS
from .shapes import OPS, Case, cases
from .timing import one_thread, synchronize

TEST_SHARE = 0.4  # of the time, at most, for the tests
RESERVE_SECONDS = 10.0  # for the case in hand and the results
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


@torch.no_grad()
def odd_checks(device: torch.device) -> dict[str, str]:
    """What is red at odd shapes, by operation."""
    red: dict[str, str] = {}
    for case in ODD_CASES:
        case = replace(case, dtype=DTYPES[device.type])
        given = BY_NAME[case.op].make(case, device)
        try:
            ours = arms_of(case, device, compiled=False)[OURS]
            problem = Checker(case, given).problem(OURS, ours)
        except Exception as error:  # a kernel that does not compile, say
            problem = f"{type(error).__name__}: {error}"
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


def measure_green(bench: Bench, made: list[Claim], red: dict[str, str], deadline: float) -> None:
    """All planned cases of green operations, till the deadline; what turns red goes to `red`."""
    on_cpu = bench.device.type == "cpu"
    for case, compiled in planned(made, on_cpu):
        if case.op in red:
            continue
        if time.monotonic() > deadline:
            bench.skipped.append(case.label)
            continue
        try:
            seconds = 0.05 if on_cpu else None
            print_case(case, measure(bench, case, seconds, compiled=compiled and not on_cpu))
        except Exception as error:
            name = "" if isinstance(error, RedCheck) else f"{case.label}: {type(error).__name__}: "
            red[case.op] = f"{name}{error}"
            bench.drop(case.op)
            print(f"RED {red[case.op]}", flush=True)
            if not _answers(bench.device):
                print("the device answers no more: nothing further is measured")
                deadline = 0.0


def _answers(device: torch.device) -> bool:
    """After some errors of a kernel every call of the process fails, whosever it is."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def run(seconds: float) -> tuple[Bench, dict[str, Any]]:
    started = time.monotonic()
    device = default_device()
    print(f"{paths_text(device)}. Checks first.", flush=True)
    tests = TestRun()
    red = odd_checks(device)
    red |= tests.red(started + TEST_SHARE * seconds)
    for name in {**dict.fromkeys(OPS), **red}:
        print(f"check {name}: {red.get(name, 'green')}", flush=True)
    made = claims(shrink=device.type == "cpu")
    bench = Bench.on(device)
    measure_green(bench, made, red, started + seconds - RESERVE_SECONDS)
    decides = device.type == "cuda"
    found = verdicts(made, bench.rows, decides)
    result = summary(bench, "gpu") | {
        "decides": decides,
        "red": red,
        "test_notes": tests.notes,
        "claims": [asdict(verdict) for verdict in found],
        "seconds": round(time.monotonic() - started, 1),
    }
    _print_end(bench, result)
    print_verdicts(found)
    return bench, result


def _print_end(bench: Bench, result: dict[str, Any]) -> None:
    for what, why in {**bench.left_out, **result["red"]}.items():
        print(f"left out: {what}: {why}")
    for note in result["test_notes"]:
        print(f"tests: {note}")
    if bench.skipped:
        print(f"out of time: {len(bench.skipped)} cases skipped, first {bench.skipped[0]}")
    print(
        f"copy {result['copy_gb_per_s']} GB/s, matrix product {result['matrix_tflop_per_s']} "
        f"TFLOP/s, noise {result['noise_median']} (median), {result['noise_worst']} (worst), "
        f"{result['seconds']} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything; default 420")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with one_thread():
        bench, result = run(arguments.seconds)
    name = "gpu" if result["decides"] else "gpu-rehearsal"
    text = json.dumps(result, indent=1) + "\n"
    (arguments.out / f"{name}.json").write_text(text, encoding="utf-8")
    if bench.rows:
        write_csv(bench, result, arguments.out / f"{name}.csv")
        plot(bench.rows, result["paths"], arguments.out / f"{name}.png")
    left_out = ("cases", "skipped", "left_out")  # long, and in the file
    line = {key: value for key, value in result.items() if key not in left_out}
    print(json.dumps(line | {"skipped": len(bench.skipped)}))
    return 1 if result["red"] else 0


if __name__ == "__main__":
    sys.exit(main())

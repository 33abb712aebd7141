"""The tests of the kernels and of captured steps on this machine, one process per file.

A red test means that the figures of the operations that name its file are not reported. A file that
did not run, or not to its end, refuses nothing: the checks beside the timing remain.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .ops import OPS
from .processes import POLL_SECONDS, ROOT, Group, end, ended

KERNEL_TESTS = ROOT / "tests" / "kernels"
NOT_ON_A_CARD = ("test_compiled",)  # compiles for minutes, and needs no card
OF_NO_OP = (*NOT_ON_A_CARD, "test_launch")
CAPTURED_STEPS = "captured steps"
CAPTURED_TESTS = ROOT / "tests" / "engine" / "test_graphs.py"

FileResult = dict[str, Any]
OnFile = Callable[[str, FileResult], None]  # (name of a test file, what came of it)


def kernel_files() -> list[Path]:
    """The tests of the kernels that a card can run."""
    files = sorted(KERNEL_TESTS.glob("test_*.py"))
    return [file for file in files if file.stem not in NOT_ON_A_CARD]


def vouched_by(file: str) -> list[str]:
    """The operations that name the file among their tests."""
    if file == CAPTURED_TESTS.stem:
        return [CAPTURED_STEPS]
    return [name for name, op in OPS.items() if file in op.tests]


def red_of(results: dict[str, FileResult]) -> dict[str, list[str]]:
    """The failed tests, by what they test."""
    red: dict[str, list[str]] = {}
    for file, result in results.items():
        for what in vouched_by(file):
            if result["failures"]:
                red.setdefault(what, []).extend(result["failures"])
    return red


class TestRun:
    """Files under pytest, as many at a time as there are cores. Leaving the block ends them."""

    __test__ = False  # pytest is not to collect it

    def __init__(self, files: Sequence[Path]) -> None:
        self.results: dict[str, FileResult] = {}
        self._waiting = list(files)
        self._running: dict[Path, Group] = {}

    def __enter__(self) -> TestRun:
        self._folder = tempfile.TemporaryDirectory()
        if importlib.util.find_spec("pytest") is None:
            for file in self._waiting:
                self.results[file.stem] = _not_run("pytest is not installed")
            self._waiting = []
        self._start_more()
        return self

    def __exit__(self, *error: object) -> None:
        end(self._running.values(), signal.SIGKILL)
        self._folder.cleanup()

    def wait(self, deadline: float, on_file: OnFile) -> dict[str, FileResult]:
        """Results by file, those that are stopped at the deadline included."""
        for name, result in self.results.items():
            on_file(name, result)
        while self._running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            codes = {file: group.code() for file, group in self._running.items()}
            for file, code in codes.items():
                if code is not None:
                    self._collect(file, code, on_file)
            self._start_more()
        end(self._running.values(), signal.SIGINT)  # on which pytest still writes its results
        for file in list(self._running):
            self._collect(file, None, on_file)
        for file in self._waiting:
            self.results[file.stem] = _not_run("out of time before its start")
            on_file(file.stem, self.results[file.stem])
        return self.results

    def _start_more(self) -> None:
        while self._waiting and len(self._running) < (os.cpu_count() or 1):
            file = self._waiting.pop(0)
            report, log = (self._path(file, ending) for ending in ("xml", "log"))
            words = ("-q", "-p", "no:cacheprovider", "--junit-xml", str(report), str(file))
            self._running[file] = Group([sys.executable, "-m", "pytest", *words], log)

    def _collect(self, file: Path, code: int | None, on_file: OnFile) -> None:
        lines = self._running.pop(file).lines()
        result = read_report(self._path(file, "xml"), file.stem, was_stopped=code is None)
        if code not in (0, 1):  # 1: tests failed, which the report has
            last = lines[-1] if lines else "no output"
            result["note"] = f"{ended(code)}; {last}"
            if code is not None and not result["failures"]:
                result["failures"][file.stem] = result["note"]
        self.results[file.stem] = result
        on_file(file.stem, result)

    def _path(self, file: Path, ending: str) -> Path:
        return Path(self._folder.name) / f"{file.stem}.{ending}"


def _not_run(why: str) -> FileResult:
    return {"tests": 0, "failed": 0, "skipped": 0, "test_seconds": 0.0, "failures": {}, "note": why}


def read_report(path: Path, file: str, *, was_stopped: bool) -> FileResult:
    """Counts of a JUnit report, and of each failed test the first line of its error.

    Of a run that was stopped, the last test is left out: it did not come to its end.
    """
    if not path.exists():
        return _not_run("no report")
    result = _not_run("")
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    for case in cases[:-1] if was_stopped else cases:
        result["tests"] += 1
        result["test_seconds"] += float(case.get("time", 0))
        result["skipped"] += case.find("skipped") is not None
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                message = next(iter((found.get("message") or "").splitlines()), "")
                result["failures"][f"{file}::{case.get('name')}"] = message
    result["failed"] = len(result["failures"])
    result["test_seconds"] = round(result["test_seconds"], 1)
    return result


def print_result(name: str, result: FileResult) -> None:
    green = result["tests"] - result["failed"] - result["skipped"]
    note = f", {result['note']}" if result["note"] else ""
    print(
        f"{name}: {green} green, {result['failed']} red, {result['skipped']} skipped, "
        f"{result['test_seconds']} s{note}",
        flush=True,
    )
    for test, message in result["failures"].items():
        print(f"  RED {test}: {message}", flush=True)


def results_of(stage_file: Path | None, files: Sequence[Path]) -> dict[str, FileResult] | None:
    """The results of these tests in another stage's file; None if it did not run them all."""
    if stage_file is None or not stage_file.exists():
        return None
    found = json.loads(stage_file.read_text(encoding="utf-8")).get("tests", {})
    names = [file.stem for file in files]
    return {name: found[name] for name in names} if {*names} <= {*found} else None

"""Programs that a benchmark starts: ranks, stages and tests. Each ends with all that it started.

A red test means that the figures of the operations that name its file are not reported. A file that
did not run, or not to its end, refuses nothing: the checks beside the timing remain.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from xml.etree import ElementTree

import torch.distributed as dist

from .kernels import OPS
from .report import Journal

ROOT = Path(__file__).resolve().parents[1]
# From the root, kernels/ would hide the package of that name that transformers looks for.
ENVIRONMENT = {"PYTHONSAFEPATH": "1"}
GRACE_SECONDS = 8.0  # to write down what is known, once a program is asked to end
POLL_SECONDS = 0.1
# A rank's own error, which stands before the launcher's line about the rank.
RANK_ERROR = re.compile(r"^(?:\[rank\d+\]: )?(\w*Error: .*)", re.MULTILINE)

TEST_SHARE = 0.4  # of a stage's time, at most, for its tests
KERNEL_TESTS = ROOT / "tests" / "kernels"
NOT_ON_A_CARD = "test_compiled"  # compiles for minutes, and needs no card
CAPTURED_STEPS = "captured steps"
CAPTURED_TESTS = ROOT / "tests" / "engine" / "test_graphs.py"

FileResult = dict[str, Any]
OnFile = Callable[[str, FileResult], None]  # (name of a test file, what came of it)


class Program:
    """A program, and whatever it starts. Without a log it prints where this process does."""

    def __init__(self, command: Sequence[str], log: Path | None = None) -> None:
        self.log = log
        out = None if log is None else log.open("wb")
        try:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=out,
                stderr=None if out is None else subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            if out is not None:
                out.close()

    def code(self) -> int | None:
        """The exit code (minus a signal's number), None while it runs. What it left is ended."""
        code = self._process.poll()
        if code is not None:
            self._send(signal.SIGKILL)
        return code

    def wait(self, deadline: float, polite: signal.Signals = signal.SIGTERM) -> int | None:
        """The exit code, or None if it had to be ended at the deadline (of time.monotonic())."""
        try:
            while time.monotonic() < deadline:
                if (code := self.code()) is not None:
                    return code
                time.sleep(POLL_SECONDS)
            return None
        finally:
            end([self], polite)

    def lines(self) -> list[str]:
        """The lines that it logged."""
        assert self.log is not None
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self._process.pid, number)


def end(programs: Iterable[Program], polite: signal.Signals = signal.SIGTERM) -> None:
    """End those that still run: asked first, so that they leave their results, then killed."""
    running = [program for program in programs if program.code() is None]
    for program in running:
        program._send(polite)
    deadline = time.monotonic() + GRACE_SECONDS
    for program in running:
        with suppress(subprocess.TimeoutExpired):
            program._process.wait(max(0.0, deadline - time.monotonic()))
        program._send(signal.SIGKILL)
        program._process.wait()


def exit_on_sigterm() -> None:
    """Let `finally` and `with` blocks run when this process is asked to end."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def ended(code: int | None) -> str:
    """How a program ended, for people."""
    if code is None:
        return "out of time"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def on_ranks(ranks: int, module: str, words: list[str], threads: int) -> Any:
    """The result of `python -m MODULE WORDS --out FILE` on so many ranks of so many threads.

    Raises ValueError with the first error that a rank printed where one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, "-m", "shardlens.launcher", "-n", str(ranks), "-m", module, "--"]
        command += [*words, "--out", str(out)]
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            error = RANK_ERROR.search(run.stderr)
            raise ValueError(f"{ranks} ranks failed: {error[1] if error else 'no message'}")
        return json.loads(out.read_text())


def hand_over(result: Any, out: Path) -> None:
    """The end of such a module: the first rank writes what it found, and all leave the group."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        out.write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def kernel_files() -> list[Path]:
    """The tests of the kernels that a card can run."""
    files = sorted(KERNEL_TESTS.glob("test_*.py"))
    return [file for file in files if file.stem != NOT_ON_A_CARD]


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
        self._running: dict[Path, Program] = {}

    def __enter__(self) -> TestRun:
        self._folder = tempfile.TemporaryDirectory()
        self._has_pytest = importlib.util.find_spec("pytest") is not None
        self._start_more()
        return self

    def __exit__(self, *error: object) -> None:
        end(self._running.values(), signal.SIGKILL)
        self._folder.cleanup()

    def wait(self, deadline: float, on_file: OnFile) -> dict[str, FileResult]:
        """Results by file, those that are stopped at the deadline included."""
        while self._running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            codes = {file: program.code() for file, program in self._running.items()}
            for file, code in codes.items():
                if code is not None:
                    self._collect(file, code, on_file)
            self._start_more()
        end(self._running.values(), signal.SIGINT)  # on which pytest still writes its results
        for file in list(self._running):
            self._collect(file, None, on_file)
        why = "out of time before its start" if self._has_pytest else "pytest is not installed"
        for file in self._waiting:
            self.results[file.stem] = _not_run(why)
            on_file(file.stem, self.results[file.stem])
        return self.results

    def _start_more(self) -> None:
        while self._has_pytest and self._waiting and len(self._running) < (os.cpu_count() or 1):
            file = self._waiting.pop(0)
            report, log = (self._path(file, ending) for ending in ("xml", "log"))
            words = ("-q", "-p", "no:cacheprovider", "--junit-xml", str(report), str(file))
            self._running[file] = Program([sys.executable, "-m", "pytest", *words], log)

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
    """Counts of a JUnit report, and the first line of each failed test's error.

    was_stopped: the last test did not come to its end, and is left out.
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


def print_tests(name: str, result: FileResult) -> None:
    green = result["tests"] - result["failed"] - result["skipped"]
    note = f", {result['note']}" if result["note"] else ""
    print(
        f"{name}: {green} green, {result['failed']} red, {result['skipped']} skipped, "
        f"{result['test_seconds']} s{note}",
        flush=True,
    )
    for test, message in result["failures"].items():
        print(f"  RED {test}: {message}", flush=True)


def run_tests(
    journal: Journal,
    files: Sequence[Path],
    deadline: float,
    truth: Path | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Record the results of test files, and what they find red.

    truth: the file of a stage that ran the tests on this very code; if it has them all, none runs.
    """
    known = results_of(truth, files)
    with TestRun([] if known is not None else files) as tests:
        meanwhile()
        if known is None:
            now = time.monotonic()

            def on_file(name: str, result: FileResult) -> None:
                print_tests(name, result)
                journal.record(tests=tests.results)

            known = tests.wait(now + TEST_SHARE * (deadline - now), on_file)
    journal.record(tests=known)
    for what, failed in red_of(known).items():
        journal.add_red(what, *failed)


def results_of(stage_file: Path | None, files: Sequence[Path]) -> dict[str, FileResult] | None:
    """The results of these tests in another stage's file; None if it did not run them all."""
    if stage_file is None or not stage_file.exists():
        return None
    found = json.loads(stage_file.read_text(encoding="utf-8")).get("tests", {})
    names = [file.stem for file in files]
    return {name: found[name] for name in names} if {*names} <= {*found} else None

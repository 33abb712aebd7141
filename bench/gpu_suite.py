"""The tests of the kernels on this machine's GPU, one process a file, all at a time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .shapes import OPS

TESTS = Path(__file__).resolve().parents[1] / "tests" / "kernels"
TAIL_LINES = 12


class TestRun:
    """Started at once; `red` waits. `notes` says what did not run, or not to its end.

    That alone refuses nothing: the checks in this process remain.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        self._folder = tempfile.TemporaryDirectory()
        files = sorted(TESTS.glob("test_*.py"))
        if not files:
            self.notes.append(f"no tests in {TESTS}")
        elif importlib.util.find_spec("pytest") is None:
            self.notes.append("pytest is not installed: the tests did not run")
        else:
            for file in files:
                self._start(file)

    def _start(self, file: Path) -> None:
        # from the root, kernels/ would hide the package of that name that transformers looks for
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
        log = Path(self._folder.name) / f"{file.stem}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=TESTS.parents[1], env=environment, stdout=out, stderr=out
            )
        self._running[file.stem] = process, log

    def red(self, deadline: float) -> dict[str, str]:
        """What failed, by operation; by file where it is of no single operation."""
        red: dict[str, str] = {}
        for name, (process, log) in self._running.items():
            try:
                code = process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.notes.append(f"{name}: stopped, out of time")
                continue
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print(f"{name}: {lines[-1] if lines else 'no output'}", flush=True)
            if code:
                print("\n".join(lines[-TAIL_LINES:]), flush=True)
                red[_tested_by(name)] = f"{name} failed"
        self._folder.cleanup()
        return red


def _tested_by(file: str) -> str:
    return next((op for op in OPS if file.removeprefix("test_").startswith(op)), file)

"""Programs that end with all that they started: each runs in a session of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
# From the root, kernels/ would hide the package of that name that transformers looks for.
ENVIRONMENT = {"PYTHONSAFEPATH": "1"}
GRACE_SECONDS = 8.0  # to write down what is known, once a program is told to end
POLL_SECONDS = 0.1


class Group:
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
        """What it logged."""
        assert self.log is not None
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # of the group nothing is left
            os.killpg(self._process.pid, number)


def end(groups: Iterable[Group], polite: signal.Signals = signal.SIGTERM) -> None:
    """End those that still run: told first, so that they leave their results, then killed."""
    running = [group for group in groups if group.code() is None]
    for group in running:
        group._send(polite)
    deadline = time.monotonic() + GRACE_SECONDS
    for group in running:
        with suppress(subprocess.TimeoutExpired):
            group._process.wait(max(0.0, deadline - time.monotonic()))
        group._send(signal.SIGKILL)
        group._process.wait()


def exit_on_sigterm() -> None:
    """Let `finally` and `with` blocks run when this process is told to end."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def ended(code: int | None) -> str:
    """How a program ended, for people."""
    if code is None:
        return "out of time"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

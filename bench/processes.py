"""Programs that a benchmark starts: groups that end with all that they started, and ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
# From the root, kernels/ would hide the package of that name that transformers looks for.
ENVIRONMENT = {"PYTHONSAFEPATH": "1"}
GRACE_SECONDS = 8.0  # to write down what is known, once a program is asked to end
POLL_SECONDS = 0.1
# A rank's own error, which stands before torch.distributed.run's account of it.
RANK_ERROR = re.compile(r"^(?:\[rank\d+\]: )?(\w*Error: .*)", re.MULTILINE)


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
        """The lines that it logged."""
        assert self.log is not None
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # of the group nothing is left
            os.killpg(self._process.pid, number)


def end(groups: Iterable[Group], polite: signal.Signals = signal.SIGTERM) -> None:
    """End those that still run: asked first, so that they leave their results, then killed."""
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
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", module, *words, "--out", str(out)]
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

"""Start a command on ranks of this machine, and end all of them as soon as one ends badly.

    python -m shardlens.launcher -n RANKS [-m MODULE] -- WORDS...

The ranks find each other through a file in memory, which only this user can open and which is gone
with the launcher; they talk through the loopback interface. Nothing listens for other machines.

Exit codes: 0 if every rank ended with 0; 2 where input was refused; 130 after Ctrl-C, 128 + the
number of another signal to the launcher; 1 for anything else. A line names the rank at fault.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import logging
import os
import re
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from .cli import LOST_CONTACT
from .rank_ends import Ending

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import SubprocessContext

IS_LINUX = sys.platform == "linux"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
POLL_S = 0.05
GRACE_S = 3.0  # that ranks have to end by themselves once one has ended badly
CLOSE_S = 2  # that they have after SIGTERM, before SIGKILL
PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent dies


class _Signalled(BaseException):
    """A signal to the launcher."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the words on ranks; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.child_of is not None:
        _become_rank(arguments.child_of, arguments.module, arguments.words)
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    _handle(handled, _leave_at_once)
    # takes a second or more, and would swallow what a handler raises
    import_module("torch.distributed.elastic.multiprocessing")
    _handle(handled, _raise)
    try:
        with _meeting_file() as path:
            ending = _run(arguments, path, handled)
    except _Signalled as caught:
        _say(_signal_line(caught.number))
        return 128 + caught.number
    line = ending.line()
    if line is not None:
        _say(line)
    return ending.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shardlens.launcher", allow_abbrev=False)
    parser.add_argument("-n", type=_ranks, default=1, metavar="RANKS")
    parser.add_argument("-m", default="shardlens", dest="module", metavar="MODULE")
    parser.add_argument("--child-of", type=int, help=argparse.SUPPRESS)  # a rank's words begin so
    parser.add_argument("words", nargs="*", metavar="WORDS")
    return parser


def _ranks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number from 1 to 1024")
    return int(text)


def _timeout_s(words: Sequence[str]) -> float:
    """The --timeout among a command's words, which has its own idea of a wrong one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--timeout", type=float, default=60.0)
    try:
        return float(parser.parse_known_args(words)[0].timeout)
    except (argparse.ArgumentError, ValueError):
        return 60.0


# The ranks


@contextmanager
def _meeting_file() -> Iterator[str]:
    """The path of a file that the ranks can open, and nobody else; it outlives nothing."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("shardlens-ranks")
        try:
            yield f"/proc/{os.getpid()}/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory(prefix="shardlens-") as folder:  # of mode 0700
            yield f"{folder}/ranks"


def _start(arguments: argparse.Namespace, path: str) -> SubprocessContext:
    """Start the ranks under torch's supervisor, with this process's output as theirs."""
    from torch.distributed.elastic import multiprocessing

    class Inherited(multiprocessing.LogsSpecs):
        """No log files: what a rank prints goes where the launcher's does."""

        def reify(self, envs: dict[int, dict[str, str]]) -> multiprocessing.LogsDest:
            streams, others, errors = (dict.fromkeys(envs, "") for _ in range(3))
            return multiprocessing.LogsDest(stdouts=streams, stderrs=others, error_files=errors)

        @property
        def root_log_dir(self) -> str:
            return ""

    logging.disable(logging.CRITICAL)  # it would account for each signal that it sends
    n, common = arguments.n, {"WORLD_SIZE": str(arguments.n), "LOCAL_WORLD_SIZE": str(arguments.n)}
    common["SHARDLENS_RENDEZVOUS"] = f"file://{path}"
    if IS_LINUX:  # where the loopback interface has this name
        common |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    words = ("-m", "shardlens.launcher", "--child-of", str(os.getpid()), "-m", arguments.module)
    # Signals wait until all ranks are known here; a rank takes this over, and lets them in again.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    context = multiprocessing.start_processes(
        name="shardlens",
        entrypoint=sys.executable,
        args={rank: (*words, "--", *map(_for_ranks, arguments.words)) for rank in range(n)},
        envs={r: {**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(n)},
        logs_specs=Inherited(),
    )
    assert isinstance(context, multiprocessing.SubprocessContext)
    return context


def _for_ranks(word: str) -> str:
    """A word of a command, in which a pipe to write to is named as ranks can open it.

    A shell names the pipe of `--json >(program)` so, and ranks inherit no open files. A pipe to
    read from is left alone: several ranks would each read a part.
    """
    named = re.fullmatch(r"(--[\w-]+=)?/(?:dev|proc/self)/fd/(\d{1,6})", word)
    if named is None or int(named[2]) <= 2 or not IS_LINUX:
        return word
    path = f"/proc/{os.getpid()}/fd/{named[2]}"
    is_written = (
        Path(path).is_fifo()
        and fcntl.fcntl(int(named[2]), fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    )
    return f"{named[1] or ''}{path}" if is_written else word


def _become_rank(parent: int, module: str, words: list[str]) -> NoReturn:
    """Run the module as if started by name, in a process that ends with its parent."""
    if IS_LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(LOST_CONTACT)
    sys.argv = [module, *words]
    # at once, also where a rank waits for the others; Ctrl-C itself reaches the launcher alone
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


# The launcher


def _run(arguments: argparse.Namespace, path: str, handled: Sequence[int]) -> Ending:
    """Start the ranks and wait for them. None of them runs afterwards."""
    context = _start(arguments, path)
    try:
        _handle(SIGNALS, signal.SIG_IGN)  # torch's supervisor has set its own
        _handle(handled, _raise)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        processes = {rank: h.proc for rank, h in context.subprocess_handlers.items()}
        return _watch(processes, _timeout_s(arguments.words))
    finally:
        _handle(SIGNALS, signal.SIG_IGN)  # from here on it ends within seconds
        context.close(signal.SIGTERM, timeout=CLOSE_S)


def _watch(processes: dict[int, Popen[bytes]], timeout_s: float) -> Ending:
    """Wait until all ranks have ended, or should have: after one that ended badly, or stopped."""
    codes: dict[int, int] = {}
    bad_since = stopped_since = None
    while True:
        now = time.monotonic()
        for rank, process in processes.items():
            code = process.poll()
            if code is not None:
                codes.setdefault(rank, code)
        running = [rank for rank in processes if rank not in codes]
        stopped = [rank for rank in running if _is_stopped(processes[rank].pid)]
        if any(codes.values()) and bad_since is None:
            bad_since = now
        stopped_since = (stopped_since or now) if stopped else None
        # those that have ended wait for nothing
        patience_s = GRACE_S if codes else timeout_s
        is_over = bad_since is not None and now - bad_since > GRACE_S
        if stopped_since is not None and now - stopped_since > patience_s:
            is_over = True
        if is_over or not running:
            return Ending(codes, running, stopped)
        time.sleep(POLL_S)


def _is_stopped(pid: int) -> bool:
    """Whether a process is held by SIGSTOP or the like."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # no Linux, or no such process any more
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """A handler for a time in which there is nothing to clean up."""
    os.write(2, f"shardlens: {_signal_line(number)}\n".encode())
    os._exit(128 + number)


def _signal_line(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise _Signalled(number)


def _handle(numbers: Sequence[int], handler: object) -> None:
    for number in numbers:
        signal.signal(number, handler)  # type: ignore[arg-type]


def _say(line: str) -> None:
    print(f"shardlens: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

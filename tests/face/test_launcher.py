"""Ranks under the launcher: exit codes, signals, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardlens.launcher import CLOSE_S, GRACE_S

MOST_S = 10.0  # from one death to the end of all
# A module for ranks: it says where it is, then does what its words say of its rank.
RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
open(f"pid-{rank}", "w").write(str(os.getpid()))
does = sys.argv[1:][rank]
if does == "wait":
    time.sleep(60)
elif does == "say":
    print("one rank speaks", "café", os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"])
elif does.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, does))
elif does == "raise":
    raise OSError("no such luck")
else:
    time.sleep(float(does) - int(float(does)))
    sys.exit(int(float(does)))
"""


class Run:
    """The launcher on such a module, in a folder that is its folder for temporary files, too."""

    def __init__(self, folder: Path, *words: str, ranks: int | None = None) -> None:
        self.folder = folder
        (folder / "rank_module.py").write_text(RANK)
        self.left = folder / "tmp"
        self.left.mkdir()
        command = [sys.executable, "-m", "shardlens.launcher", "-n", str(ranks or len(words))]
        path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
        self.process = subprocess.Popen(
            [*command, "-m", "rank_module", "--", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(self.left), "PYTHONSAFEPATH": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self, n: int = 2) -> list[int]:
        """The ranks' processes, once all have started."""
        deadline = time.monotonic() + 60
        files = [self.folder / f"pid-{rank}" for rank in range(n)]
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str, str]:
        """Exit code, output and errors; nothing of the run may be left."""
        out, err = self.process.communicate(timeout=60)
        pids = [int(file.read_text()) for file in self.folder.glob("pid-*") if file.read_text()]
        assert not any(is_alive(pid) for pid in pids)
        assert not list(self.left.iterdir())
        return self.process.returncode, out, err


def is_alive(pid: int) -> bool:
    """Whether a process runs, half a second from now at the latest."""
    for _ in range(25):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        if stat.rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(autouse=True)
def _linux() -> None:
    if sys.platform != "linux":
        pytest.skip("looks into /proc")


# Ranks that end


@pytest.mark.parametrize(
    "does, code, line",
    [
        (["0", "0"], 0, ""),
        (["0.5", "0"], 0, ""),  # one after the other
        (["2", "2.5"], 2, ""),  # rank 0 has said why
        (["2.5", "2"], 2, ""),
        (["0", "2"], 2, "rank 1 refused what rank 0 did not"),
        (["3", "7.5"], 1, "rank 1 ended with exit code 7"),
        (["wait", "7"], 1, "rank 1 ended with exit code 7"),
        (["wait", "SIGKILL"], 1, "rank 1 was killed by SIGKILL"),
        (["SIGSEGV", "0"], 1, "rank 0 was killed by SIGSEGV"),
        (["wait", "SIGINT"], 130, "rank 1 was interrupted"),
        (["wait", "SIGTERM"], 1, "rank 1 was killed by SIGTERM"),
        (["wait", "130"], 130, "rank 1 was interrupted"),
        (["wait", "2"], 2, "rank 1 refused what rank 0 did not"),
    ],
)
def test_codes(does: list[str], code: int, line: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    run = Run(tmp_path, *does)
    run.pids()
    assert run.end() == (code, "", f"shardlens: {line}\n" if line else "")
    assert time.monotonic() - begun < MOST_S + 20  # 60 if it had waited


def test_an_error_names_its_rank(tmp_path: Path) -> None:
    code, _, err = Run(tmp_path, "raise", "wait").end()
    assert code == 1 and "OSError: no such luck" in err
    assert err.splitlines()[-1] == "shardlens: rank 0 ended with exit code 1"


def test_output_is_as_the_ranks_write_it(tmp_path: Path) -> None:
    code, out, err = Run(tmp_path, "say", "say", "0").end()
    assert (code, err) == (0, "")
    lines = [f"one rank speaks café {rank} 3" for rank in range(2)]
    assert sorted(out.splitlines()) == lines


def test_a_stopped_rank_is_ended(tmp_path: Path) -> None:
    """After the --timeout among the command's words, or soon where another has ended."""
    run = Run(tmp_path, "wait", "SIGSTOP", "--timeout", "1", ranks=2)
    run.pids()
    begun = time.monotonic()
    assert run.end() == (1, "", "shardlens: rank 1 is stopped and does not answer the others\n")
    assert time.monotonic() - begun < 1 + MOST_S


@pytest.mark.parametrize(
    "words, said", [(["-n", "0"], "'0'"), (["-n", "x"], "'x'"), (["-k"], "-k")]
)
def test_words_of_the_launcher(words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "shardlens.launcher", *words]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and said in run.stderr


# Signals to the launcher


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stops", [False, True])
def test_a_signal_ends_all(number: int, stops: bool, tmp_path: Path) -> None:
    """With one line, also where a rank does not listen."""
    run = Run(tmp_path, "wait", "SIGSTOP" if stops else "wait")
    run.pids()
    begun = time.monotonic()
    run.process.send_signal(number)
    run.process.send_signal(signal.SIGINT)  # an impatient user
    code, out, err = run.end()
    assert time.monotonic() - begun < MOST_S
    assert code in (128 + number, 128 + signal.SIGINT) and not out
    assert len(err.splitlines()) == 1 and err.startswith("shardlens: ")


@pytest.fixture(params=["early", "late"])
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    """A launcher that is killed as soon as it has a rank, or once all ranks run their module."""
    run = Run(tmp_path, "wait", "wait")
    if request.param == "late":
        run.pids()
    else:
        while not (found := children(run.process.pid)):
            time.sleep(0.001)
        (tmp_path / "pid-first").write_text(str(found[0]))
    run.process.kill()
    yield run


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_ranks_do_not_outlive_the_launcher(killed: Run) -> None:
    assert killed.end() == (-signal.SIGKILL, "", "")


@pytest.mark.parametrize("wait_s", [0.3, 0.8, 1.3])
def test_an_early_signal_is_one_line(wait_s: float, tmp_path: Path) -> None:
    """While the launcher itself starts."""
    run = Run(tmp_path, "wait", "wait")
    time.sleep(wait_s)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == (130, "", "shardlens: interrupted\n")


def test_the_times_allowed_are_within_the_promise() -> None:
    assert GRACE_S + CLOSE_S < MOST_S - 2

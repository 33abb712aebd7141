"""Whole runs on ranks: signals at random moments, ports, and torch's own launcher as before."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import LAUNCH, launch

TIMEOUT_S, MOST_S, LONGEST_S = 3, 10, 8  # of a rank; from a death to the end of all; of a run
# runs for longer than any test waits to strike
WORDS = ["generate", "demo", "--prompt", "Anna is", "--temperature", "1", "--max-new-tokens", "500"]
WORDS += ["--timeout", str(TIMEOUT_S)]
LOOPBACK = {"0100007F", "0" * 24 + "01000000"}  # as /proc/net writes 127.0.0.1 and ::1

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def is_alive(pid: int) -> bool:
    return state(pid) not in (None, "Z", "X")


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    folder.mkdir()
    return subprocess.Popen(
        [str(LAUNCH), *words],
        # torch's cache of compiled code is no file of the run
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TMPDIR": str(folder),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    while len(children(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    return children(process.pid)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("to", ["rank", "launcher"])
@pytest.mark.parametrize("name", ["KILL", "TERM", "INT", "STOP"])
def test_nothing_outlives_a_signal(name: str, to: str, share: float, tmp_path: Path) -> None:
    """At a moment early, midway and late, drawn anew each time."""
    drawn = random.Random()
    number = getattr(signal, f"SIG{name}")
    folder = tmp_path / "temporary"
    process = start(folder, "-n", "2", *WORDS)
    ranks = ranks_of(process)
    time.sleep(max(0.0, LONGEST_S * share + drawn.uniform(-0.4, 0.4)))
    at = drawn.choice(range(2))
    begun = time.monotonic()
    os.kill(ranks[at] if to == "rank" else process.pid, number)
    if (name, to) == ("STOP", "launcher"):
        # the ranks go on without it, and their end waits for it
        while any(map(is_alive, ranks)):
            assert time.monotonic() - begun < 100
            time.sleep(0.1)
        begun = time.monotonic()
        process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    took_s = time.monotonic() - begun
    assert took_s < MOST_S + (TIMEOUT_S if name == "STOP" else 0), took_s
    time.sleep(0.2)
    assert not any(map(is_alive, ranks))
    assert not list(folder.iterdir())
    stopped = f"rank {at} is stopped and does not answer the others"
    expected = {
        ("KILL", "rank"): (1, f"rank {at} was killed by SIGKILL"),
        ("TERM", "rank"): (1, f"rank {at} was killed by SIGTERM"),
        ("INT", "rank"): (130, f"rank {at} was interrupted"),
        ("STOP", "rank"): (1, stopped),
        ("KILL", "launcher"): (-signal.SIGKILL, None),  # nobody is left to speak
        ("TERM", "launcher"): (143, "ended by SIGTERM"),
        ("INT", "launcher"): (130, "interrupted"),
        ("STOP", "launcher"): (0, None),
    }[name, to]
    line = "" if expected[1] is None else f"shardlens: {expected[1]}\n"
    assert (process.returncode, err) == (expected[0], line)


def test_nothing_listens_for_other_machines(tmp_path: Path) -> None:
    """While ranks meet, load and generate. Under torch's launcher something does."""
    seen = {}
    for name, options in {"closed": [], "open": ["--standalone"]}.items():
        process = start(tmp_path / name, "-n", "2", *options, *WORDS)
        addresses: set[str] = set()
        while process.poll() is None:
            addresses |= listening(family(process.pid))
            time.sleep(0.05)
        process.communicate()
        assert process.returncode == 0
        seen[name] = addresses
    assert seen["closed"] and seen["closed"] <= LOOPBACK, "gloo's ports are seen, and no others"
    assert seen["open"] - LOOPBACK, "the test sees ports"


def family(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        found += children(each)
    return found


def listening(pids: list[int]) -> set[str]:
    """The addresses, as /proc/net writes them, that processes listen on."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:  # it has ended, or closed one
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


# A process alone, and torch's launcher


def test_an_interrupt_of_one_process_is_one_line(tmp_path: Path) -> None:
    process = start(tmp_path / "temporary", "-n", "1", *WORDS)
    assert process.stdout is not None
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "shardlens: interrupted\n")


def test_torchs_launcher_still_works() -> None:
    words = ["--prompt", "Anna is", "--max-new-tokens", "4"]
    here = launch("-n", "2", "generate", "demo", *words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "shardlens", "generate", "demo", *words]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    theirs = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert here.returncode == theirs.returncode == 0, (here.stderr, theirs.stderr)
    assert here.stdout == theirs.stdout != ""


def test_bad_input_under_torchs_launcher(tmp_path: Path) -> None:
    process = start(
        tmp_path / "temporary", "-n", "2", "--nnodes", "1", "--standalone", "lens", "no"
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "shardlens: the following arguments are required: --prompt" in err
    assert not list((tmp_path / "temporary").iterdir())


def test_a_rank_that_is_lost_under_torchs_launcher(tmp_path: Path) -> None:
    """The others say so in a line, before torch's account of it."""
    process = start(tmp_path / "temporary", "-n", "2", "--standalone", *WORDS)
    while len(ranks := [pid for pid in family(process.pid) if is_rank(pid)]) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    assert process.stdout is not None
    process.stdout.read(20)  # it generates
    os.kill(ranks[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "gloo" not in err
    lost = [line for line in err.splitlines() if line.startswith("shardlens: ")]
    assert len(lost) == 1 and "another rank is gone, or does not answer" in lost[0]
    assert not any(map(is_alive, ranks))


def is_rank(pid: int) -> bool:
    try:
        return b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False

"""The programs that `bench.gpu` starts: tests, whose results it reads, and stages. All end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shardlens.bench import processes
from shardlens.bench.kernels import OPS
from shardlens.bench.processes import (
    CAPTURED_STEPS,
    CAPTURED_TESTS,
    ENVIRONMENT,
    KERNEL_TESTS,
    NOT_ON_A_CARD,
    Program,
    TestRun,
    kernel_files,
    red_of,
    results_of,
    run_tests,
    vouched_by,
)
from shardlens.bench.report import Journal

OF_NO_OP = (NOT_ON_A_CARD, "test_launch")
# Starts a program that sleeps, writes its id to a file, and goes on as the second argument says.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(float(sys.argv[2]))
"""
MIXED = """
import pytest

@pytest.fixture
def broken():
    raise OSError("no card")

def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.parametrize("n", [1, 2])
def test_each(n): assert n == 1
@pytest.mark.skip
def test_skipped(): pass
def test_set_up(broken): pass
"""
HANGS = """
import subprocess, sys, time, pathlib

def test_right(): pass
def test_wrong(): assert False, "first"
def test_hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    pathlib.Path({pid!r}).write_text(str(child.pid))
    time.sleep(120)
def test_never(): pass
"""


def is_alive(pid: int) -> bool:
    """A process that ended may wait for its parent: then its state is Z."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(what: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.02)


def test_every_kernel_test_is_mapped() -> None:
    files = {path.stem for path in KERNEL_TESTS.glob("test_*.py")}
    assert files
    for file in files:
        assert vouched_by(file) or file in OF_NO_OP, f"{file} belongs into an operation's tests"
    for name, op in OPS.items():
        assert op.tests and {*op.tests} <= files, f"{name} names a test that does not exist"
    chosen = {path.stem for path in kernel_files()}
    assert chosen == files - {NOT_ON_A_CARD} and "test_compiled" not in chosen
    assert CAPTURED_TESTS.exists()


def test_a_red_test_speaks_of_its_operation() -> None:
    def result(*failed: str) -> dict[str, Any]:
        return {"failures": dict.fromkeys(failed, "AssertionError")}

    found = {
        "test_head_kernel": result("test_head_kernel::test_a", "test_head_kernel::test_b"),
        "test_sampled_rows": result("test_sampled_rows::test_c"),
        "test_swiglu": result(),
        "test_launch": result("test_launch::test_d"),  # of no operation
        "test_graphs": result("test_graphs::test_e"),
    }
    assert red_of(found) == {
        "head_stats": [
            "test_head_kernel::test_a",
            "test_head_kernel::test_b",
            "test_sampled_rows::test_c",
        ],
        CAPTURED_STEPS: ["test_graphs::test_e"],
    }


def test_counts_and_first_lines(tmp_path: Path) -> None:
    dies = "import os\ndef test_dies(): os.kill(os.getpid(), 11)"
    files = [tmp_path / "test_mixed.py", tmp_path / "test_dies.py"]
    for file, text in zip(files, (MIXED, dies), strict=True):
        file.write_text(text)
    seen: list[str] = []
    with TestRun(files) as tests:
        found = tests.wait(time.monotonic() + 60, lambda name, _: seen.append(name))
    assert sorted(seen) == ["test_dies", "test_mixed"]
    mixed = found["test_mixed"]
    assert (mixed["tests"], mixed["failed"], mixed["skipped"], mixed["note"]) == (6, 3, 1, "")
    assert list(mixed["failures"]) == [
        "test_mixed::test_wrong",
        "test_mixed::test_each[2]",
        "test_mixed::test_set_up",
    ]
    assert mixed["failures"]["test_mixed::test_wrong"] == "AssertionError: one is not two"
    assert "OSError: no card" in mixed["failures"]["test_mixed::test_set_up"]
    # a file that takes its process down is red, as a whole
    assert list(found["test_dies"]["failures"]) == ["test_dies"]
    assert "signal SIGSEGV" in found["test_dies"]["note"]


def test_a_file_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results until then are kept; being late is not red."""
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 1)  # so that the second waits
    pid_file = tmp_path / "pid"
    files = [tmp_path / "test_hangs.py", tmp_path / "test_waits.py"]
    files[0].write_text(HANGS.format(pid=str(pid_file)))
    files[1].write_text("def test_a(): pass")
    with TestRun(files) as tests:
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
        pid = int(pid_file.read_text())
        assert is_alive(pid)
        found = tests.wait(time.monotonic(), lambda *_: None)
    late = found["test_hangs"]
    assert (late["tests"], late["failed"]) == (2, 1)
    assert late["note"].startswith("out of time")
    assert list(late["failures"]) == ["test_hangs::test_wrong"]
    assert found["test_waits"]["note"] == "out of time before its start"
    assert not found["test_waits"]["failures"]
    wait_for(lambda: not is_alive(pid), 5)


def test_a_stage_records_tests_and_what_is_red(tmp_path: Path) -> None:
    """Checks that a stage makes meanwhile count beside them; known results are not made again."""
    file, journal = tmp_path / "test_swiglu.py", Journal(tmp_path / "stage.json")
    file.write_text('def test_wrong(): assert False, "no"')
    run_tests(
        journal,
        [file],
        time.monotonic() + 150,
        meanwhile=lambda: journal.add_red("head_stats", "at odd shapes"),
    )
    found = json.loads(journal.path.read_text())
    red = {"head_stats": ["at odd shapes"], "swiglu": ["test_swiglu::test_wrong"]}
    assert found["red"] == red and found["tests"]["test_swiglu"]["failed"] == 1
    file.unlink()
    later = Journal(tmp_path / "later.json")
    run_tests(later, [file], time.monotonic(), truth=journal.path)
    assert later.content["tests"] == found["tests"]
    assert later.content["red"] == {"swiglu": red["swiglu"]}


def test_results_of_another_stage(tmp_path: Path) -> None:
    path = tmp_path / "h100-truth.json"
    files = [Path("test_a.py"), Path("test_b.py")]
    assert results_of(path, files) is None
    path.write_text('{"tests": {"test_a": {"failures": {}}}}')
    assert results_of(path, files) is None  # one was not run
    assert results_of(path, files[:1]) == {"test_a": {"failures": {}}}


@pytest.mark.parametrize("sleeps, code", [(120, None), (0, 0)])
def test_what_a_program_started_ends_with_it(sleeps: int, code: int | None, tmp_path: Path) -> None:
    """At a deadline, and when the program itself is done."""
    pid_file = tmp_path / "pid"
    program = Program([sys.executable, "-c", PARENT, str(pid_file), str(sleeps)], tmp_path / "log")
    wait_for(lambda: pid_file.exists() and pid_file.read_text())
    pid = int(pid_file.read_text())
    assert sleeps == 0 or is_alive(pid)
    started = time.monotonic()
    assert program.wait(time.monotonic() + (0.2 if sleeps else 30)) == code
    assert time.monotonic() - started < 20
    wait_for(lambda: not is_alive(pid), 5)


@pytest.mark.slow
def test_a_killed_stage_leaves_what_it_has(tmp_path: Path) -> None:
    """SIGKILL between two runs: the file is whole, and says what was in progress."""
    path, truth = tmp_path / "x.json", tmp_path / "truth.json"
    truth.write_text(json.dumps({"tests": {"test_graphs": {"failures": {}}}}))
    words = [
        "--stage",
        "end-to-end",
        "--seconds",
        "300",
        "--file",
        str(path),
        "--truth",
        str(truth),
    ]
    command = [sys.executable, "-m", "shardlens.bench.gpu", *words, "--shapes", "cpu-small"]
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, start_new_session=True)

    def content() -> Any:
        return json.loads(path.read_text()) if path.exists() else {"shapes": {}}

    def has_figures() -> bool:
        shapes = content().get("shapes", {})
        return bool(shapes.get("cpu-small", {}).get("runs"))

    try:
        wait_for(has_figures, 120)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = content()
    assert found["finished"] is False and found["in_progress"].startswith("cpu-small: ")
    (shape,) = found["shapes"].values()
    assert "5 shardlens" in shape["runs"] and len(shape["runs"]) < 7
    assert found["environment"]["torch"] == torch.__version__

"""The arguments that launch.sh hands to pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LAUNCH

ALWAYS = ["-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
ACROSS = ["-m", "torch.distributed.run", "--nproc-per-node"]
# Finds every module that it is asked for, and prints what else it is asked, a word a line.
PYTHON = """#!/bin/sh
if [ "$1" != -c ]; then printf '%s\\n' "$@"; fi
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which that python comes first."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], ["-m", "not slow"]),
        (["--slow"], ["-m", "slow"]),
        (
            ["-x", "tests/a b.py", "--slow", "-k", "c d"],
            ["-m", "slow", "-x", "tests/a b.py", "-k", "c d"],
        ),
        # the last -m is the one that pytest goes by
        (["-m", "gpu and slow"], ["-m", "not slow", "-m", "gpu and slow"]),
    ],
)
def test_test(words: list[str], expected: list[str], path: str) -> None:
    run = subprocess.run(
        [str(LAUNCH), "test", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [*ALWAYS, *expected]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["-n", "1", "lens", "x"], ["-m", "shardlens", "lens", "x"]),
        (
            ["-n", "2", "lens", "a b", "-n", "3"],
            ["-m", "shardlens.launcher", "-n", "2", "--", "lens", "a b", "-n", "3"],
        ),
        (
            ["-n", "2", "--nnodes", "2", "--rdzv-endpoint=a:1", "lens", "x"],
            [
                *(*ACROSS, "2", "--log-dir", "LOGS", "--nnodes", "2", "--rdzv-endpoint=a:1"),
                *("-m", "shardlens", "lens", "x"),
            ],
        ),
        (
            ["--standalone", "-n", "1", "lens"],
            [*ACROSS, "1", "--log-dir", "LOGS", "--standalone", "-m", "shardlens", "lens"],
        ),
    ],
)
def test_ranks(words: list[str], expected: list[str], path: str, tmp_path: Path) -> None:
    """Ranks of one machine start closed; options of torch.distributed.run go to it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    run = subprocess.run(
        [str(LAUNCH), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "TMPDIR": str(folder)},
    )
    assert run.returncode == 0, run.stderr
    found = ["LOGS" if word.startswith(str(folder)) else word for word in run.stdout.splitlines()]
    assert found == expected
    assert not list(folder.iterdir())


def test_pytest_goes_by_the_last_marker(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """On which `./launch.sh test -m ...` rests."""
    (tmp_path / "test_two.py").write_text(
        "import pytest\n@pytest.mark.slow\ndef test_slow(): ...\ndef test_fast(): ...\n"
    )
    ini = str(pytestconfig.inipath)
    for markers, expected in (
        (["not slow"], "test_fast"),
        (["slow"], "test_slow"),
        (["not slow", "slow"], "test_slow"),
    ):
        words = [word for marker in markers for word in ("-m", marker)]
        command = ["pytest", "-c", ini, "-p", "no:cacheprovider", "--collect-only", "-q"]
        run = subprocess.run(
            [sys.executable, "-m", *command, *words, str(tmp_path)], capture_output=True, text=True
        )
        found = [line for line in run.stdout.splitlines() if "::" in line]
        assert len(found) == 1 and found[0].endswith(f"::{expected}"), run.stdout

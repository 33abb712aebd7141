"""Commands whose output cannot be read or written to the end: the files asked for are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LAUNCH

from shardlens.cli import main

LENS = ["lens", "demo", "--prompt", "Anna is cautious. A bear stands near the barn."]
GENERATE = ["generate", "demo", "--prompt", "Anna is\n", "--max-new-tokens", "40"]
PLAN = ["plan", "demo", "--ranks", "1", "--context", "8"]
DIRECT = [sys.executable, "-m", "shardlens"]
RANKS = [str(LAUNCH), "-n", "2"]


def started(words: list[str], **options: object) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": path, "PYTHONSAFEPATH": "1"},
        **options,  # type: ignore[call-overload]
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and the text of standard error."""
    assert process.stderr is not None
    said = process.stderr.read()
    return process.wait(timeout=120), said


@pytest.mark.slow
@pytest.mark.parametrize("start", [DIRECT, RANKS], ids=["1 process", "2 ranks"])
@pytest.mark.parametrize("command", [LENS, GENERATE, PLAN], ids=lambda words: words[0])
@pytest.mark.parametrize("n_lines", [0, 1])
def test_a_reader_that_leaves(
    n_lines: int, command: list[str], start: list[str], tmp_path: Path
) -> None:
    """It has seen enough: nothing is said, and the files are written all the same."""
    files = ["--json", str(tmp_path / "x.json")]
    if command is not PLAN:
        files += ["--out", str(tmp_path / "x.html")]
    process = started([*start, *command, *files], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(n_lines):
        assert process.stdout.readline().strip()
    process.stdout.close()
    assert ended(process) == (0, "")
    assert json.loads((tmp_path / "x.json").read_text())
    if command is not PLAN:
        assert "</table>" in (tmp_path / "x.html").read_text()
    assert len(list(tmp_path.iterdir())) == len(files) // 2


@pytest.mark.slow
@pytest.mark.parametrize("start", [DIRECT, RANKS], ids=["1 process", "2 ranks"])
@pytest.mark.parametrize("command", [LENS, GENERATE, PLAN], ids=lambda words: words[0])
def test_a_full_output(command: list[str], start: list[str], tmp_path: Path) -> None:
    """One line says so, and the files are written all the same."""
    with open("/dev/full", "w") as full:
        process = started([*start, *command, "--json", str(tmp_path / "x.json")], stdout=full)
        line = "shardlens: standard output cannot be written: No space left on device\n"
        assert ended(process) == (1, line)
    assert json.loads((tmp_path / "x.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("start", [DIRECT, RANKS], ids=["1 process", "2 ranks"])
def test_a_pipe_that_a_shell_opened(start: list[str]) -> None:
    """--json >(program): the shell hands over an open pipe, and its name."""
    reader, writer = os.pipe()
    words = [*start, *LENS, "--json", f"/dev/fd/{writer}"]
    process = started(words, stdout=subprocess.DEVNULL, pass_fds=(writer,))
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        content = json.load(file)
    assert ended(process) == (0, "") and content["taps"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [DIRECT, RANKS], ids=["1 process", "2 ranks"])
def test_a_full_file(start: list[str]) -> None:
    process = started([*start, *LENS, "--json", "/dev/full"], stdout=subprocess.DEVNULL)
    line = "shardlens: /dev/full cannot be written: No space left on device\n"
    assert ended(process) == (1, line)


def test_help_on_a_full_or_closed_output() -> None:
    with open("/dev/full", "w") as full:
        code, said = ended(started([*DIRECT, "--help"], stdout=full))
        assert code == 1 and said.endswith("No space left on device\n") and said.count("\n") == 1
    process = started([*DIRECT, "--help"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert ended(process) == (0, "")


def test_output_that_goes_nowhere_or_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for redirected in (">/dev/null", ">&-", ">&- 2>&-", "2>/dev/full >/dev/null"):
        line = f'"$@" {redirected}'
        words = ["sh", "-c", line, "sh", *DIRECT, *PLAN, "--json", str(file)]
        assert ended(started(words)) == (0, "")
        assert json.loads(file.read_text())
        file.unlink()
    # bad input, and nobody to tell it to
    words = ["sh", "-c", '"$@" 2>/dev/full', "sh", *DIRECT, *PLAN, "--json", str(tmp_path)]
    assert ended(started(words)) == (2, "")


def test_json_on_standard_output(tmp_path: Path) -> None:
    """The content of --json /dev/stdout follows the table, in a file as in a pipe."""
    with (tmp_path / "out").open("w") as out:
        assert ended(started([*DIRECT, *PLAN, "--json", "/dev/stdout"], stdout=out)) == (0, "")
    text = (tmp_path / "out").read_text()
    table, brace, rest = text.partition("\n{\n")
    assert "tokens/s" in table and json.loads(brace + rest)["model"] == "demo"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_few_characters(encoding: str) -> None:
    """Characters that it does not have are escaped, and no output is lost."""
    words = [
        "sh",
        "-c",
        f'PYTHONIOENCODING={encoding} "$@"',
        "sh",
        *DIRECT,
        "plan",
        "demo",
        "--ranks",
    ]
    process = started([*words, "1", "--context", "8"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    shown = process.stdout.read()
    assert ended(process) == (0, "") and "tokens/s" in shown and "fewest ranks" in shown


PAIR = '{"positive": "Anna is calm", "negative": "Anna is bold"}\n'
STEER = ["--pairs", "PAIRS", "--at", "last", "--layers", "1"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["steer", "extract", *STEER, "--out", "v.pt"], "v.pt: steering vectors are kept as"),
        (["steer", "extract", *STEER, "--out", "no/v.gguf"], "there is no folder"),
        (["steer", "extract", *STEER, "--out", "v.gguf", "--json", "v.gguf"], "written twice"),
        (["steer", "eval", "--pairs", "PAIRS", "--png", "x.gif"], "x.gif: curves and map"),
        (["steer", "eval", "--pairs", "PAIRS", "--png", "x.png", "--json", "."], "is a folder"),
        (["steer", "eval", "--pairs", "PAIRS", "--json", "x", "--png", "no/x.png"], "no folder"),
        (["steer", "generate", "--vector", "none", "--prompt", "a", "--json", "no/x"], "no folder"),
        (["lens", "--prompt", "a", "--out", "x.html", "--out", "x.gif"], "x.gif: a trace is"),
        (["lens", "--prompt", "a", "--out", "x.html", "--json", "x.html"], "written twice"),
        (["generate", "--prompt", "a", "--out", "locked.png"], "locked.png cannot be written"),
        (["plan", "--ranks", "1", "--context", "8", "--json", "no/x"], "there is no folder"),
        (["bench", "steer-sweep", "--json", "no/x"], "there is no folder"),
    ],
)
def test_targets_are_checked_before_the_model_is_looked_for(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("PAIRS").write_text(PAIR * 2)
    Path("locked.png").touch()
    Path("locked.png").chmod(0o400)
    before = sorted(tmp_path.iterdir())
    if words[0] != "bench":
        n_verbs = 2 if words[0] == "steer" else 1
        words = [*words[:n_verbs], "/no/such/model", *words[n_verbs:]]
    assert main(words) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and said.out == ""
    assert sorted(tmp_path.iterdir()) == before

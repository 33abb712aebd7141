"""README's programs and commands do what they say, and docs/structure.md names what there is."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import LAUNCH, launch

from shardlens.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STRUCTURE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
ROOMS = ("shardlens", "bench", "interp", "engine", "model", "tokenizer", "parallel", "kernels")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BY_LAUNCHER = ("demo", "test", "check")  # launch.sh does these itself
QUICK = ("lens", "generate", "plan")
NOT_RUN = ("bench", *BY_LAUNCHER)  # minutes each, or what other tests run


def blocks(text: str, *languages: str) -> Iterator[str]:
    """Fenced blocks, each after as many empty lines as stand before it in the file."""
    for found in BLOCK.finditer(text):
        if found[1] in languages:
            yield "\n" * text.count("\n", 0, found.start(2)) + found[2]


def lines(text: str, *languages: str) -> list[list[str]]:
    """The lines of blocks, each once, as words without comments and with any $(...) a $NAME."""
    whole = re.sub(r"\$\([^)]*\)", "$NAME", text.replace("\\\n", " "))
    joined = blocks(whole, *languages)
    found = [line for block in joined for line in block.splitlines()]
    return list({line.strip(): shlex.split(line, comments=True) for line in found}.values())


def commands(text: str, *languages: str) -> list[list[str]]:
    """Command lines that start shardlens."""
    starts = (["./launch.sh"], ["python", "-m", "shardlens"])
    found = lines(text, *languages)
    return [words for words in found if any(words[: len(start)] == start for start in starts)]


def programs(text: str) -> list[list[str]]:
    """Modules that command lines start by name, each with its options."""
    found = [words for words in lines(text, "bash", "text") if words[:2] == ["python", "-m"]]
    return [words[2:] for words in found if words[2].startswith("shardlens.")]


def without_launcher(words: list[str]) -> list[str]:
    """The words that shardlens gets: those after launch.sh and its own options."""
    if words[0] == "python":
        return words[3:]
    rest = words[1:]
    while rest[0].startswith("-"):
        takes_value = "=" not in rest[0] and rest[0] != "--standalone"
        rest = rest[1 + takes_value :]
    return rest


def asked_of_shardlens(text: str, *languages: str) -> list[list[str]]:
    asked = [without_launcher(words) for words in commands(text, *languages)]
    return [words for words in asked if words[0] not in BY_LAUNCHER]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write to, in which README's paths to the packaged questions lead there."""
    (tmp_path / "model").symlink_to(ROOT / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Programs


def inputs_of_a_kernel() -> dict[str, Any]:
    """Tensors that the block about kernels takes for given."""
    n, rows, d = 2, 3, 16
    return {
        "vectors": torch.randn(n, d),
        "modes": torch.tensor([0, 1], dtype=torch.int32),
        "index": torch.tensor([1, -1, 0]),
        "scale": torch.full((rows,), 0.5),
        "x": torch.randn(rows, d),
        "weight": torch.ones(d),
        "residual": torch.randn(rows, d),
        "gate_up": torch.randn(rows, 2 * d),
    }


def test_programs_of_the_readme_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after another, as one program."""
    names: dict[str, Any] = {}
    given = list(blocks(README, "python"))
    assert len(given) >= 3
    for program in given:
        if "shardlens.kernels" in program:
            names |= inputs_of_a_kernel()
        exec(compile(program, str(ROOT / "README.md"), "exec"), names)
    trace, report = names["trace"], names["report"]
    assert (
        trace.token_ids.shape[1:] == (2 * 6, 5)
        and trace.target_rank.shape == (trace.token_ids.shape[:2])
    )
    assert len(names["results"]) == 2 and names["result"].text
    printed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in printed} == {"0"}, "only the first request has a lens"
    assert len(report.taps) == 3 and min(slope.mean for slope in report.slopes) > 0
    assert names["out"].shape == (3, 16) and names["h"].shape == (3, 16)
    for name in ("trace.html", "cautious.safetensors"):
        assert (folder / name).stat().st_size > 1000


# Commands


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "docs/structure.md"])
def test_commands_are_known(file: str) -> None:
    """Their words are those of the parsers, in blocks that are run and in those that are not."""
    text = (ROOT / file).read_text(encoding="utf-8")
    launcher = LAUNCH.read_text(encoding="utf-8")
    for words in commands(text, "bash", "text"):
        rest = without_launcher(words)
        if rest[0] in BY_LAUNCHER:
            assert re.search(rf"^    {rest[0]}\)$", launcher, re.MULTILINE), words
        else:
            build_parser(rest[0]).parse_args(rest)


def test_there_are_commands() -> None:
    asked = asked_of_shardlens(README, "bash", "text")
    assert {words[0] for words in asked} == {
        "lens",
        "generate",
        "plan",
        "steer",
        "model",
        "bench",
    }
    assert {words[1] for words in asked if words[0] == "steer"} == {"extract", "generate", "eval"}


@pytest.mark.parametrize(
    "line", ["./launch.sh -n 2 lens demo --promt x", "./launch.sh steer evaluate demo"]
)
def test_a_command_that_is_not_there_is_seen(line: str) -> None:
    [words] = asked_of_shardlens(f"```bash\n{line}\n```\n", "bash")
    with pytest.raises(ValueError):
        build_parser(words[0]).parse_args(words)


@pytest.mark.parametrize(
    "words",
    [words for words in asked_of_shardlens(README, "bash") if words[0] in QUICK],
    ids=" ".join,
)
def test_quick_commands_run(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one rank, in this process."""
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() and not printed.err


@pytest.mark.slow
def test_commands_run_as_typed(folder: Path) -> None:
    """Through launch.sh, each after those before it, whose files it takes."""
    printed = {}
    for words in commands(README, "bash"):
        if without_launcher(words)[0] not in NOT_RUN:
            run = launch(*words[1:], cwd=folder)
            assert run.returncode == 0, (words, run.stderr)
            printed[" ".join(without_launcher(words)[:2])] = " ".join(run.stdout.split())
    assert (folder / "eval.json").stat().st_size > 1000
    said = re.findall(r"unsteered `(.*?)`, at -1 `(.*?)`, at 1 `(.*?)`", " ".join(README.split()))
    for text in said[0]:
        assert text in printed["steer generate"]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_modules_that_are_started_take_these_options(file: str) -> None:
    started = programs((ROOT / file).read_text(encoding="utf-8"))
    assert started
    for module in {words[0] for words in started}:
        command = [sys.executable, "-m", module, "--help"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        for words in started:
            if words[0] == module:
                assert all(word in run.stdout for word in words if word.startswith("--")), words


# docs/structure.md


def test_the_rooms_have_their_files_listed() -> None:
    """Every source file has its line under its room, and no other file has any."""
    for room in ROOMS:
        _, found, rest = STRUCTURE.partition(f"\n### `{room}/`")
        assert found, room
        section = re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]
        listed = re.findall(r"^- `(\w+\.py)`[:,] \S", section, re.MULTILINE)
        assert len(listed) == len(set(listed))
        files = {path.name for path in (ROOT / room).glob("*.py")} - {"__init__.py"}
        assert set(listed) == files, room


def test_what_is_named_is_there() -> None:
    """Files anywhere in the text, and functions beside their files."""
    for name in re.findall(r"`([\w./-]+/[\w.-]*)`", STRUCTURE):
        assert (ROOT / name).exists(), name
    named = re.findall(r"`([\w.]+)` \(`([\w/]+\.py)`\)", STRUCTURE)
    assert len(named) > 15
    for name, file in named:
        nodes: list[ast.AST] = [ast.parse((ROOT / file).read_text(encoding="utf-8"))]
        for part in name.split("."):
            nodes = [
                child
                for node in nodes
                for child in ast.iter_child_nodes(node)
                if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part
            ]
        assert nodes, f"{name} is not in {file}"


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "docs/structure.md"])
def test_links_lead_to_files(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / file).parent / target).exists(), target
    if file != "docs/structure.md":
        assert "(docs/structure.md)" in text

"""Names keep to the dictionary in CONTRIBUTING.md, and docstrings have a subject.

The table under "Words" is the data: its first column lists the words that the code uses, its last
one those that no name may have.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("shardlens", "bench", "interp", "engine", "model", "tokenizer", "parallel", "kernels")
FOLDERS = (*ROOMS, "examples", "tests")
# (banned word, where it is allowed, what it means there)
ALLOWED = (
    ("group", "parallel/", "a process group"),
    ("group", "tests/engine/test_plan.py", "a process group"),
    ("group", "engine/plan.py", "the ranks that share one model"),
    ("group", "kernels/decode_attention.py", "the query heads that share a key head"),
    ("pattern", "tokenizer/", "a regular expression"),
    ("pattern", "tests/tokenizer/", "a regular expression"),
    ("pattern", "examples/demo_tokenizer.py", "a regular expression"),
    ("pattern", "model/", "names of files or modules, as the hub and LoRA call them"),
    ("level", "tokenizer/", "byte-level, a kind of BPE"),
    ("level", "tests/tokenizer/", "byte-level, a kind of BPE"),
    ("level", "examples/demo_tokenizer.py", "byte-level, a kind of BPE"),
    ("level", "tests/model/test_gguf.py", "byte-level, a kind of BPE"),
)
DEFINED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NAMED = (*DEFINED, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
NO_SUBJECT = re.compile(r"(Of|That|Those|What|Which|Whose)\b")


def dictionary() -> list[list[str]]:
    """The rows of the table under "Words", cell by cell."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition("\n## Words\n")[2], flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def used_words() -> set[str]:
    return {word for row in dictionary() for word in re.findall(r"`(\w+)`", row[0])}


@cache
def banned_words() -> tuple[set[str], set[str]]:
    """(words banned in every name, words banned as a whole name)."""
    found = [pair for row in dictionary() for pair in re.findall(r"`(\w+)`( alone)?", row[2])]
    return {word for word, alone in found if not alone}, {word for word, alone in found if alone}


def stored_names(tree: ast.AST) -> Iterator[str]:
    """Every name that a file gives to something: variables, arguments, functions, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname
        elif isinstance(node, NAMED) and node.name:
            yield node.name


@cache
def banned_in(name: str) -> set[str]:
    """The banned words of a name in snake_case or CamelCase, in the singular."""
    everywhere, alone = banned_words()
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    joined = f"_{'_'.join(words)}_"
    found = {word for word in everywhere if f"_{word}_" in joined or f"_{word}s_" in joined}
    return found | (alone & {"_".join(words)})


def bad_names(source: str, path: str) -> dict[str, set[str]]:
    """Names with banned words that are not allowed in a file, and those words."""
    allowed = {word for word, where, _ in ALLOWED if path.startswith(where)}
    names = {name: banned_in(name) - allowed for name in set(stored_names(ast.parse(source)))}
    return {name: words for name, words in sorted(names.items()) if words}


def docstrings_without_subject(source: str) -> list[str]:
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Module, *DEFINED))]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [text.splitlines()[0] for text in texts if NO_SUBJECT.match(text)]


@cache
def sources() -> dict[str, str]:
    """The text of every Python file, by its path from the root."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}


def test_names_have_no_banned_word() -> None:
    found = {path: bad for path, text in sources().items() if (bad := bad_names(text, path))}
    assert not found, "\n".join(f"{path}: {names}" for path, names in found.items())


def test_docstrings_have_a_subject() -> None:
    texts = sources().items()
    found = {path: bad for path, text in texts if (bad := docstrings_without_subject(text))}
    assert not found, "\n".join(f"{path}: {lines}" for path, lines in found.items())


def test_the_dictionary_is_of_words_that_the_code_uses() -> None:
    rows = dictionary()
    assert len(rows) > 25 and all(len(row) == 3 and row[0] and row[1] for row in rows)
    names = {name for text in sources().values() for name in stored_names(ast.parse(text))}
    assert not used_words() - names


def test_banned_words_are_known() -> None:
    """The table is read: words that were once in use are in it, and each exception is of one."""
    everywhere, alone = banned_words()
    assert {"place", "winner", "arm", "ride", "retire", "settle", "told", "own"} <= everywhere
    assert alone == {"one", "ones"}
    assert {word for word, *_ in ALLOWED} <= everywhere


@pytest.mark.parametrize("word, where, why", ALLOWED)
def test_every_exception_is_needed(word: str, where: str, why: str) -> None:
    texts = [text for path, text in sources().items() if path.startswith(where)]
    names = {name for text in texts for name in stored_names(ast.parse(text))}
    assert any(word in banned_in(name) for name in names), f"{word} ({why}) is not in {where}"


@pytest.mark.parametrize(
    "planted, word",
    [
        ("def f(place): ...", "place"),
        ("def f(*, tap_places=()): ...", "place"),
        ("class TopWinners: ...", "winner"),
        ("def riding(): ...", "riding"),
        ("self.is_settled = True", "settled"),
        ("for one in range(3): ...", "one"),
        ("import shardlens as told", "told"),
        ("try: ...\nexcept ValueError as own: ...", "own"),
        ("LEVELS = 3", "level"),
        ("(arm := 3)", "arm"),
        ("copied_at_host = 1", "at_host"),
    ],
)
def test_a_planted_name_is_seen(planted: str, word: str) -> None:
    (words,) = bad_names(planted, "engine/planted.py").values()
    assert words == {word}


@pytest.mark.parametrize(
    "name", ["lags_one_step", "replaced", "warm_up", "placement", "known", "alarm", "ownership"]
)
def test_names_that_only_resemble_a_banned_word(name: str) -> None:
    assert not bad_names(f"{name} = 1", "engine/planted.py")


def test_an_exception_holds_in_its_folder_alone() -> None:
    assert not bad_names("group = 1", "parallel/group.py")
    assert bad_names("group = 1", "engine/loop.py") == {"group": {"group"}}


@pytest.mark.parametrize("opening", ["Of", "That of", "Those", "What", "Which", "Whose"])
@pytest.mark.parametrize("form", ['"""{}"""', 'class A:\n    """{}"""', 'def f():\n    """{}"""'])
def test_a_planted_docstring_is_seen(form: str, opening: str) -> None:
    line = f"{opening} a step reads."
    assert docstrings_without_subject(form.format(line)) == [line]
    assert not docstrings_without_subject(form.format("The states that a step reads."))

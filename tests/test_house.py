"""The house: what may import what, what is packaged, and how long files are."""

from __future__ import annotations

import ast
import statistics
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Top to bottom: a folder imports only what stands below it.
ORDER = [
    "shardlens",
    "bench",
    "interp",
    "engine",
    "model",
    "tokenizer",
    "parallel",
    "kernels",
]


def imported_folders(path: Path) -> set[str]:
    """The house's folders that a file imports."""
    return folders_in(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[0])


def folders_in(source: str, folder: str) -> set[str]:
    """The house's folders that source text of a folder imports, absolutely or relatively.

    `from ..model.x import y` only passes by the package on the way: it imports of model/ alone.
    """
    package = ["shardlens"] if folder == "shardlens" else ["shardlens", folder]
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*up, *filter(None, [node.module])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    found = set()
    for first, *inner in (name.split(".") for name in names):
        if first == "shardlens":
            found.add(inner[0] if inner and inner[0] in ORDER else "shardlens")
    return found


def source_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", source_files(*ORDER), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    allowed = set(ORDER[ORDER.index(folder) :])
    upward = imported_folders(path) - allowed
    assert not upward, f"{folder}/ may not import {upward}"


def test_the_import_test_sees_imports() -> None:
    assert {"model", "engine"} <= imported_folders(ROOT / "interp" / "extract.py")
    assert "interp" in imported_folders(ROOT / "shardlens" / "language_model.py")
    assert imported_folders(ROOT / "kernels" / "head_stats_reference.py") <= {"kernels"}


@pytest.mark.parametrize(
    "statement",
    [
        "from ..language_model import LanguageModel",
        "from .. import language_model",
        "from .. import load",
        "from shardlens.language_model import LanguageModel",
        "from shardlens import load",
        "import shardlens",
        "import shardlens.cli",
        "def late():\n    from ..cli import main",
    ],
)
def test_an_import_of_the_face_is_seen(statement: str) -> None:
    assert folders_in(statement, "bench") == {"shardlens"}


def test_imports_from_below_are_not_of_the_face() -> None:
    below = "from ..model.config import ModelConfig\nfrom .. import engine\nfrom . import timing"
    assert folders_in(below, "bench") == {"model", "engine", "bench"}
    assert folders_in("import shardlens.parallel.loss, torch", "interp") == {"parallel"}


def test_kernels_do_not_communicate() -> None:
    for path in source_files("kernels"):
        assert "torch.distributed" not in path.read_text(encoding="utf-8"), path


def test_every_folder_is_packaged() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {"shardlens", *(f"shardlens.{folder}" for folder in ORDER[1:])}
    assert set(tool["packages"]) == packages == set(tool["package-dir"])
    for folder in ORDER:
        nested = [
            path.parent for path in (ROOT / folder).rglob("*.py") if path.parent.name != folder
        ]
        assert not nested, f"{nested} would not be packaged"
        assert (ROOT / folder / "py.typed").exists()


def test_files_are_short() -> None:
    """None is too long to read in a sitting, and half of them fit a few screens."""
    counts = []
    for path in source_files(*ORDER, "tests", "examples"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"
        counts.append(lines)
    assert statistics.median(counts) < 150


def test_runtime_does_not_need_transformers() -> None:
    for path in source_files(*ORDER[2:], "shardlens"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]} if not node.level else set()
            else:
                continue
            assert "transformers" not in names, path

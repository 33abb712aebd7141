"""The house: what may import what, what is packaged, and how long files are."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
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
    """The house's folders that a file imports, absolutely or relatively."""
    folder = path.relative_to(ROOT).parts[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "shardlens" if folder == "shardlens" else f"shardlens.{folder}"
            up = base.split(".")[: len(base.split(".")) - (node.level - 1)] if node.level else []
            module = ".".join([*up, *(node.module or "").split(".")]).strip(".")
            names = [module] + [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "shardlens":
                inner = parts[1] if len(parts) > 1 and parts[1] in ORDER else "shardlens"
                found.add(inner)
    return found


def source_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", source_files(*ORDER), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    allowed = set(ORDER[ORDER.index(folder) :])
    # `from ..model.x import y` names the package itself on the way, which is not an import of it
    upward = imported_folders(path) - allowed - {"shardlens"}
    assert not upward, f"{folder}/ may not import {upward}"


def test_the_import_test_sees_imports() -> None:
    assert {"model", "engine"} <= imported_folders(ROOT / "interp" / "extract.py")
    assert "interp" in imported_folders(ROOT / "shardlens" / "language_model.py")
    assert imported_folders(ROOT / "kernels" / "head_stats_reference.py") <= {"kernels"}


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


@pytest.mark.slow
def test_wheel_holds_everything(tmp_path: Path) -> None:
    """The wheel has every source file and the demo model, and nothing of the tests."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    # a copy, because a build leaves build/ behind, which later builds would pack again
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=skipped)
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for path in source_files(*ORDER):
        relative = path.relative_to(ROOT)
        name = str(relative) if relative.parts[0] == "shardlens" else f"shardlens/{relative}"
        assert name in held
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert f"shardlens/model/demo/{name}" in held
    assert not any("tests" in name or name.endswith(".pt") for name in held)


def test_files_are_short() -> None:
    for path in source_files(*ORDER, "tests", "examples"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"


def test_importing_has_no_effects() -> None:
    """No process group, no seed, no device, no logging set up, no environment changed."""
    program = """
import os, logging, torch, torch.distributed as dist
before = dict(os.environ), torch.initial_seed(), logging.root.handlers[:], torch.get_num_threads()
import shardlens, shardlens.cli
after = dict(os.environ), torch.initial_seed(), logging.root.handlers[:], torch.get_num_threads()
assert before == after, (before, after)
assert not dist.is_initialized() and not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT.parent)


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
            assert not names & {"transformers", "tokenizers"}, path

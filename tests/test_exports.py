"""Public names: each is listed once by its package, and tests and examples import them from there.

A file of tests that looks inside a room names that room's modules in INTERNALS. The files of bench/
and the command line are programs, which have no other name than their own.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import shardlens
from shardlens.kernels.lazy_imports import listed_names

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("interp", "engine", "model", "tokenizer", "parallel", "kernels")
PACKAGES = ("shardlens", *(f"shardlens.{room}" for room in ROOMS))
PROGRAMS = ("shardlens.cli", "shardlens.launcher", "shardlens.rank_ends", "shardlens.bench")
# file of tests: the modules whose insides it tests or replaces
INTERNALS = {
    "engine/test_capture.py": "engine.cuda_graph engine.engine engine.runner engine.step",
    "engine/test_edit_table.py": "engine.edit_table",
    "engine/test_engine.py": "engine.edit_table engine.engine engine.lens_plan engine.loop"
    " engine.step parallel.head_reduce",
    "engine/test_graphs.py": "engine.engine engine.memory engine.runner engine.step"
    " kernels.triton_shim",
    "engine/test_plan.py": "engine.limits engine.memory engine.plan kernels.head_cut",
    "engine/test_record.py": "engine.record",
    "engine/test_sampling.py": "engine.sampling",
    "engine/test_vector_files.py": "engine.vector_files",
    "engine/test_vectors.py": "engine.tap_names",
    "face/test_demo.py": "kernels.head_cut",
    "face/test_many_requests.py": "engine.loop",
    "face/test_plan_command.py": "engine.fit model.load session",
    "face/test_stop.py": "engine.loop stop_text",
    "interp/test_intervals.py": "interp.intervals",
    "interp/test_lens.py": "engine.lens_rows parallel.head_reduce",
    "interp/test_propensity.py": "interp.propensity",
    "interp/test_report.py": "interp.report",
    "interp/test_steerability.py": "interp.suggest",
    "kernels/test_compiled.py": "kernels.head_cut",
    "kernels/test_decode_attention.py": "kernels.decode_attention",
    "kernels/test_few_rows_linear.py": "kernels.few_rows_linear",
    "kernels/test_head_blocks.py": "engine.memory kernels.blocks kernels.head_cut",
    "kernels/test_head_kernel.py": "kernels.head_cut",
    "kernels/test_head_stats.py": "kernels.head_stats_reference",
    "kernels/test_launch.py": "kernels.head_cut kernels.launch",
    "kernels/test_tensor_cores.py": "kernels.head_cut kernels.launch kernels.triton_shim",
    "model/test_weights.py": "model.sharding",
    "parallel/compiled_rank.py": "parallel.collectives",
    "parallel/test_packing.py": "parallel.packing",
    "steered.py": "engine.edit_table",
    "test_exports.py": "kernels.lazy_imports",
    "tokenizer/test_chat.py": "tokenizer.chat",
    "tokenizer/test_template_bounds.py": "tokenizer.chat",
    "tokenizer/test_visible.py": "tokenizer.visible",
}


def init_of(package: str) -> Path:
    return ROOT.joinpath(package.removeprefix("shardlens.").replace(".", "/"), "__init__.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_its_names_once(package: str) -> None:
    """In the form that type checkers take for an export, with all of them at run time, too."""
    nodes = list(ast.walk(ast.parse(init_of(package).read_text(encoding="utf-8"))))
    exported = [
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if alias.asname == alias.name
    ]
    assert exported and len(exported) == len(set(exported))
    assert import_module(package).__all__ == sorted(exported)
    assert set(listed_names(init_of(package))) == set(exported)
    assert not any(isinstance(node, ast.Assign) for node in nodes), "a second list"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_there_when_used(package: str) -> None:
    module = import_module(package)
    homes = listed_names(init_of(package))
    assert set(homes) <= set(dir(module))
    names: dict[str, Any] = {}
    exec(f"from {package} import *", names)
    for public, home in homes.items():
        assert names[public] is getattr(import_module(home, package), public)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense
    with pytest.raises(ImportError):
        exec(f"from {package} import nonsense")


def test_folders_are_attributes_of_the_package() -> None:
    program = "import shardlens; shardlens.parallel.ColumnLinear; shardlens.kernels.swiglu"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert shardlens.model is import_module("shardlens.model")


def test_the_face_shows_names_of_its_packages() -> None:
    """Whoever starts from a room finds there what the face has of it."""
    for name, home in listed_names(init_of("shardlens")).items():
        room = home.split(".")[1]
        if room in ROOMS:
            assert name in listed_names(init_of(f"shardlens.{room}")), name


def internals(source: str) -> Iterator[str]:
    """The modules within packages that a program imports: names that their packages do not list."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            yield from (m for m in modules if m.startswith("shardlens.") and m not in PACKAGES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "shardlens":
            module = node.module or ""
            listed = listed_names(init_of(module)) if module in PACKAGES else None
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if listed is None:
                    yield module
                elif alias.name not in listed and full not in (*PACKAGES, "shardlens.bench"):
                    yield full


def internals_of(path: Path) -> set[str]:
    found = set(internals(path.read_text(encoding="utf-8")))
    inside = {m for m in found if not f"{m}.".startswith(tuple(f"{p}." for p in PROGRAMS))}
    return {module.removeprefix("shardlens.") for module in inside}


def test_examples_import_public_names() -> None:
    for path in sorted((ROOT / "examples").rglob("*.py")):
        assert not set(internals(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT / "tests"))
)
def test_tests_import_public_names(path: Path) -> None:
    known = INTERNALS.get(path.relative_to(ROOT / "tests").as_posix(), "")
    assert internals_of(path) == set(known.split())


def test_few_tests_look_inside() -> None:
    assert sum(len(modules.split()) for modules in INTERNALS.values()) < 60
    for name in INTERNALS:
        assert (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize(
    "program, module",
    [
        ("from shardlens.parallel import TensorParallel", None),
        ("import shardlens.engine", None),
        ("from shardlens import Trace, engine", None),
        ("from shardlens.parallel.group import TensorParallel", "shardlens.parallel.group"),
        ("def f():\n    from shardlens.engine import Engine, loop", "shardlens.engine.loop"),
        ("import shardlens.engine.loop as loop", "shardlens.engine.loop"),
        ("from shardlens import session", "shardlens.session"),
    ],
)
def test_a_look_inside_is_seen(program: str, module: str | None) -> None:
    assert set(internals(program)) == ({module} if module else set())

"""No file imports another that imports it back, directly or by way of others.

Imports of any kind count: relative and absolute, for type checkers alone, and inside functions. A
package's `__init__.py` stands for the names that it takes from its files: a file of the same room
may be named by its package, and only the file counts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FACE = "shardlens"
ROOMS = (FACE, "bench", "interp", "engine", "model", "tokenizer", "parallel", "kernels")
Graph = dict[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    """engine/plan.py -> shardlens.engine.plan; an __init__.py is its package."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[:1] == [FACE] else [FACE, *parts])


def names_imported(node: ast.AST, package: str) -> Iterator[str]:
    """The targets that an import statement may name: modules, or names of modules, all absolute."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package.split(".")
        base = base[: len(base) - node.level + 1] if node.level else []
        module = ".".join([*base, *filter(None, [node.module])])
        yield from (f"{module}.{alias.name}" for alias in node.names)


def homes(init: Path, package: str) -> dict[str, str]:
    """The names that a package takes from its files, and those files' modules."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found |= {a.asname or a.name: f"{package}.{node.module}" for a in node.names}
    return found


def import_graph(root: Path, rooms: tuple[str, ...]) -> Graph:
    """The files of some rooms by module name, and the files that each imports."""
    files = {module_name(p, root): p for room in rooms for p in sorted((root / room).rglob("*.py"))}
    packages = {name: homes(p, name) for name, p in files.items() if p.name == "__init__.py"}

    def resolved(name: str) -> str | None:
        """The module that a dotted name stands for or lies in."""
        package, _, last = name.rpartition(".")
        if last in packages.get(package, {}):
            return packages[package][last]  # also where a file has the name of what it holds
        while name and name not in files:
            name = name.rpartition(".")[0]
        return None if name in packages else name or None

    graph: Graph = {}
    for module, path in files.items():
        if module in packages:
            continue
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        package = module.rpartition(".")[0]
        names = {resolved(name) for node in nodes for name in names_imported(node, package)}
        graph[module] = {name for name in names if name is not None and name != module}
    return graph


def circle(graph: Graph) -> list[str] | None:
    """Modules each of which imports the next, and the last the first; None if there are none."""
    done: set[str] = set()
    path: list[str] = []

    def found(module: str) -> list[str] | None:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        path.append(module)
        for other in sorted(graph.get(module, ())):
            if (circular := found(other)) is not None:
                return circular
        done.add(path.pop())
        return None

    return next((c for module in sorted(graph) if (c := found(module)) is not None), None)


def test_no_files_import_each_other() -> None:
    graph = import_graph(ROOT, ROOMS)
    assert len(graph) > 80 and sum(map(len, graph.values())) > 300
    assert circle(graph) is None


KINDS = {
    "relative": "from .b import g",
    "through the room": "from ..engine.b import g",
    "by the module": "from . import b",
    "absolute": "from shardlens.engine.b import g",
    "absolute module": "import shardlens.engine.b",
    "by the package": "from shardlens.engine import g",
    "in a function": "def f():\n    from .b import g",
    "for type checkers": "if TYPE_CHECKING:\n    from .b import g",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_circle_is_seen(kind: str, tmp_path: Path) -> None:
    """A circle of two files and of three, whichever way the files name each other."""
    room = tmp_path / "engine"
    room.mkdir()
    (room / "__init__.py").write_text("if TYPE_CHECKING:\n    from .b import g\n")
    (room / "a.py").write_text(KINDS[kind] + "\n")
    (room / "b.py").write_text("import os\nfrom os import path\n")
    assert import_graph(tmp_path, ("engine",)) == {
        "shardlens.engine.a": {"shardlens.engine.b"},
        "shardlens.engine.b": set(),
    }
    assert circle(import_graph(tmp_path, ("engine",))) is None
    (room / "b.py").write_text("from .a import f\n")
    two = circle(import_graph(tmp_path, ("engine",)))
    assert two == ["shardlens.engine.a", "shardlens.engine.b"]
    (room / "b.py").write_text("from .c import h\n")
    (room / "c.py").write_text("def h():\n    import shardlens.engine.a\n")
    three = circle(import_graph(tmp_path, ("engine",)))
    assert three == [f"shardlens.engine.{name}" for name in "abc"]

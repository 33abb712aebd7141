"""A package's public names, each imported when it is first used.

torch takes seconds to import, and not every command needs it. Such a package lists its names once,
where type checkers see them, in the form that marks a name as exported:

    if TYPE_CHECKING:
        from .head_stats import head_stats as head_stats
    lazy_package(__name__)

It is here because every other package may import this one.
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


def lazy_package(name: str, folders: tuple[str, ...] = ()) -> None:
    """Make a package import the names that it lists for type checkers when they are asked for.

    folders: packages inside it that are attributes, too. A name may be that of its own module; the
    package then has the name.
    """
    module = sys.modules[name]
    assert module.__file__ is not None
    homes = listed_names(Path(module.__file__))

    class LazyPackage(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name in folders:
                return import_module(f".{name}", self.__name__)
            if name not in homes:
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            value = getattr(import_module(homes[name], self.__name__), name)
            super().__setattr__(name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            # The import system sets a submodule on its package. Where a module is named like
            # a name that it defines, the package has the latter.
            if name in homes and isinstance(value, ModuleType):
                value = getattr(value, name)
            super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *homes, *folders})

    module.__class__ = LazyPackage
    module.__all__ = sorted(homes)  # type: ignore[attr-defined]


def listed_names(init: Path) -> dict[str, str]:
    """The names under `if TYPE_CHECKING:`, each with the module that has it, such as ".config"."""
    return {
        alias.name: "." * node.level + (node.module or "")
        for block in ast.parse(init.read_text(encoding="utf-8")).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

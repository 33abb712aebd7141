"""A package's public names, each imported when it is first used.

torch takes seconds to import, and not every command needs it. Such a package sets its own class:

    sys.modules[__name__].__class__ = lazy_package({"head_stats": ".head_stats"})

Here, because every other package may import what stands in this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy_package(homes: Mapping[str, str], folders: tuple[str, ...] = ()) -> type[ModuleType]:
    """The class of a package whose names come from other modules.

    homes: of each name the module that has it, such as ".config". folders: packages inside it that
    are attributes, too. A name may be that of its own module; the package then has the name.
    """

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
            # The import system sets a submodule on its package. Of a module that is named like
            # what it has, the package shows the latter.
            if name in homes and isinstance(value, ModuleType):
                value = getattr(value, name)
            super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *homes, *folders})

    return LazyPackage

"""Names of a package that are imported when first used: torch takes seconds, and a plan needs none.

Here, because every package but `kernels` may import what stands in this one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(
    package: str, homes: Mapping[str, str], folders: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """(__getattr__, __dir__) of a package (PEP 562): homes has the module, ".config", of each name.

    folders: packages inside it that are attributes too.
    """

    def get(name: str) -> Any:
        if name in folders:
            return import_module(f".{name}", package)
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], package), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *folders})

    return get, names

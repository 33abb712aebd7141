"""Ranks, collectives that count their bytes, sharded layers, and the sharded vocabulary."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "ColumnLinear",
    "RowLinear",
    "TensorParallel",
    "Traffic",
    "VocabEmbedding",
    "VocabHead",
    "Winners",
    "reduce_head",
]

if TYPE_CHECKING:
    from .group import TensorParallel, Traffic
    from .linear import ColumnLinear, RowLinear
    from .vocab import VocabEmbedding, VocabHead
    from .winners import Winners, reduce_head
else:
    # Imported when first used: the spans of a rank do without torch.
    _HOMES = {
        "ColumnLinear": ".linear",
        "RowLinear": ".linear",
        "TensorParallel": ".group",
        "Traffic": ".group",
        "VocabEmbedding": ".vocab",
        "VocabHead": ".vocab",
        "Winners": ".winners",
        "reduce_head": ".winners",
    }

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name], __name__), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

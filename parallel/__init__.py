"""Ranks, collectives that count their bytes, sharded layers, and the sharded vocabulary."""

from typing import TYPE_CHECKING

from .lazy import lazily

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
    __getattr__, __dir__ = lazily(__name__, _HOMES)

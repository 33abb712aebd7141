"""Ranks, collectives that count their bytes, sharded layers, and the sharded vocabulary."""

import sys
from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

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
    from .head_reduce import Winners, reduce_head
    from .linear import ColumnLinear, RowLinear
    from .vocab import VocabEmbedding, VocabHead
else:
    _HOMES = {
        "ColumnLinear": ".linear",
        "RowLinear": ".linear",
        "TensorParallel": ".group",
        "Traffic": ".group",
        "VocabEmbedding": ".vocab",
        "VocabHead": ".vocab",
        "Winners": ".head_reduce",
        "reduce_head": ".head_reduce",
    }
    sys.modules[__name__].__class__ = lazy_package(_HOMES)

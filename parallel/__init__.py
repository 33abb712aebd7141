"""Ranks, collectives that count their bytes, sharded layers, and the sharded vocabulary."""

from .group import TensorParallel, Traffic
from .linear import ColumnLinear, RowLinear
from .vocab import VocabEmbedding, VocabHead
from .winners import Winners, reduce_head

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

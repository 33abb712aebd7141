"""Ranks, collectives that count their bytes, sharded layers, head and loss."""

import sys
from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

__all__ = [
    "ColumnLinear",
    "HeadResult",
    "RowLinear",
    "SampleResult",
    "Span",
    "TensorParallel",
    "Traffic",
    "VocabEmbedding",
    "VocabHead",
    "agreed",
    "all_gather",
    "all_reduce",
    "copy_to_ranks",
    "reduce_from_ranks",
    "reduce_head",
    "split_even",
    "split_heads",
    "split_kv_heads",
    "split_vocab",
    "token_logits",
    "vocab_parallel_cross_entropy",
]

if TYPE_CHECKING:
    from .collectives import agreed, all_gather, all_reduce, copy_to_ranks, reduce_from_ranks
    from .group import TensorParallel, Traffic
    from .head_reduce import HeadResult, SampleResult, reduce_head, token_logits
    from .linear import ColumnLinear, RowLinear
    from .loss import vocab_parallel_cross_entropy
    from .spans import Span, split_even, split_heads, split_kv_heads, split_vocab
    from .vocab import VocabEmbedding, VocabHead
else:
    _HOMES = {
        "ColumnLinear": ".linear",
        "HeadResult": ".head_reduce",
        "RowLinear": ".linear",
        "SampleResult": ".head_reduce",
        "Span": ".spans",
        "TensorParallel": ".group",
        "Traffic": ".group",
        "VocabEmbedding": ".vocab",
        "VocabHead": ".vocab",
        "agreed": ".collectives",
        "all_gather": ".collectives",
        "all_reduce": ".collectives",
        "copy_to_ranks": ".collectives",
        "reduce_from_ranks": ".collectives",
        "reduce_head": ".head_reduce",
        "split_even": ".spans",
        "split_heads": ".spans",
        "split_kv_heads": ".spans",
        "split_vocab": ".spans",
        "token_logits": ".head_reduce",
        "vocab_parallel_cross_entropy": ".loss",
    }
    sys.modules[__name__].__class__ = lazy_package(_HOMES)

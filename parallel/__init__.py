"""Ranks, collectives that count their bytes, sharded layers, head and loss."""

from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

if TYPE_CHECKING:
    from .agreement import asked_alike as asked_alike
    from .agreement import waiting_long as waiting_long
    from .collectives import agreed as agreed
    from .collectives import all_gather as all_gather
    from .collectives import all_reduce as all_reduce
    from .collectives import copy_to_ranks as copy_to_ranks
    from .collectives import reduce_from_ranks as reduce_from_ranks
    from .digest import Digest as Digest
    from .group import TensorParallel as TensorParallel
    from .group import Traffic as Traffic
    from .group import is_lost_contact as is_lost_contact
    from .head_reduce import HeadResult as HeadResult
    from .head_reduce import SampleResult as SampleResult
    from .head_reduce import head_rows as head_rows
    from .head_reduce import reduce_head as reduce_head
    from .head_reduce import token_logits as token_logits
    from .layouts import vocab_slice as vocab_slice
    from .linear import ColumnLinear as ColumnLinear
    from .linear import RowLinear as RowLinear
    from .loss import vocab_parallel_cross_entropy as vocab_parallel_cross_entropy
    from .spans import Span as Span
    from .spans import split_even as split_even
    from .spans import split_heads as split_heads
    from .spans import split_vocab as split_vocab
    from .vocab import VocabEmbedding as VocabEmbedding
    from .vocab import VocabHead as VocabHead
    from .vocab import VocabSlice as VocabSlice

lazy_package(__name__)

"""The vocabulary split over ranks: the embedding and the head.

Rank r holds ids [start, stop) of `vocab`, stored in `padded` rows: the same number on every rank,
of which the last ranks need fewer. Padding rows are never multiplied, so padding can never win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, empty, nn

from ..kernels.few_rows_linear import linear
from .collectives import copy_to_ranks, reduce_from_ranks
from .group import Axes, TensorParallel
from .spans import Span


def vocab_rows(weight: Tensor, vocab: Span, token_ids: Tensor, parallel: TensorParallel) -> Tensor:
    """Rows of a table by token id, given by the ranks that hold them: [...] int64 -> [..., d].

    weight: this rank's part [padded, d].
    """
    if parallel.size == 1:
        return F.embedding(token_ids, weight)
    return reduce_from_ranks(local_rows(weight, vocab, token_ids), parallel)


def local_rows(weight: Tensor, vocab: Span, token_ids: Tensor) -> Tensor:
    """Rows [..., d] of this rank's part of a table, zero for ids [...] of other ranks."""
    if weight.shape[0] == 0:
        return weight.new_zeros(*token_ids.shape, weight.shape[1])
    is_local = (token_ids >= vocab.start) & (token_ids < vocab.stop)
    local_ids = (token_ids - vocab.start).where(is_local, 0)
    return F.embedding(local_ids, weight) * is_local[..., None]


class VocabEmbedding(nn.Module):
    """Token ids [...] int64 -> rows of the full table [..., d], the same on every rank."""

    def __init__(self, vocab: Span, d: int, *, parallel: TensorParallel) -> None:
        super().__init__()
        self.vocab, self.parallel = vocab, parallel
        self.weight = nn.Parameter(empty(vocab.padded, d))

    def forward(self, token_ids: Tensor) -> Tensor:
        return vocab_rows(self.weight, self.vocab, token_ids, self.parallel)


class Head(Protocol):
    """A rank's rows of an unembedding W_U, and the ranks that hold the other rows."""

    @property
    def weight(self) -> Tensor:
        """[n or more, d]: the rows of ids `vocab.start:vocab.stop`, then padding."""

    @property
    def vocab(self) -> Span:
        """The ids of the rows, among all."""

    @property
    def axes(self) -> Axes:
        """The axes over which the vocabulary is split, that of the largest parts first."""

    @property
    def valid_weight(self) -> Tensor:
        """[n, d], without padding."""


@dataclass(frozen=True, eq=False)
class VocabSlice:
    """A `Head` of rows that somebody else made; gradients flow to `weight`."""

    weight: Tensor
    vocab: Span
    axes: Axes = ()

    @property
    def valid_weight(self) -> Tensor:
        return self.weight[: self.vocab.size]


class VocabHead(nn.Module):
    """This rank's rows of the unembedding W_U: normed states [..., d] -> logits [..., n].

    n = stop - start: logits of ids [start, stop) alone, which stay on this rank. Lens, sampling and
    loss do without them: `reduce_head` and `vocab_parallel_cross_entropy` stream over the weight,
    and never hold a row's logits whole.
    """

    def __init__(self, vocab: Span, d: int, *, parallel: TensorParallel) -> None:
        super().__init__()
        self.vocab, self.parallel = vocab, parallel
        self.weight = nn.Parameter(empty(vocab.padded, d))

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(copy_to_ranks(hidden, self.parallel), self.valid_weight)

    @property
    def axes(self) -> Axes:
        return (self.parallel,)

    @property
    def valid_weight(self) -> Tensor:
        """[stop - start, d], without padding."""
        return self.weight[: self.vocab.size]

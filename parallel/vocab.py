"""The vocabulary split over ranks: embedding, and the weight of the head.

Rank r holds ids [start, stop) of `vocab`, stored in `padded` rows: the same number on every rank,
the last ones padded. Padding rows are never multiplied, so padding can never win.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, empty, nn

from .collectives import reduce_from_ranks
from .group import TensorParallel
from .spans import Span


class VocabEmbedding(nn.Module):
    """Token ids [...] int64 -> rows of the full table [..., d], the same on every rank."""

    def __init__(self, vocab: Span, d: int, *, parallel: TensorParallel) -> None:
        super().__init__()
        self.vocab, self.parallel = vocab, parallel
        self.weight = nn.Parameter(empty(vocab.padded, d))

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.parallel.size == 1:
            return F.embedding(token_ids, self.weight)
        mine = (token_ids >= self.vocab.start) & (token_ids < self.vocab.stop)
        local_ids = (token_ids - self.vocab.start).where(mine, 0)
        rows = F.embedding(local_ids, self.weight) * mine[..., None]
        return reduce_from_ranks(rows, self.parallel)


class VocabHead(nn.Module):
    """This rank's rows of the unembedding W_U. It has no forward: logits are never all formed.

    See `reduce_head`, which streams over `valid_weight` and exchanges winners only.
    """

    def __init__(self, vocab: Span, d: int, *, parallel: TensorParallel) -> None:
        super().__init__()
        self.vocab, self.parallel = vocab, parallel
        self.weight = nn.Parameter(empty(vocab.padded, d))

    @property
    def valid_weight(self) -> Tensor:
        """[stop - start, d], without padding."""
        return self.weight[: self.vocab.size]

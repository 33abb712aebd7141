"""The part of each full tensor that a rank holds, as a span of each of its dims.

Tensors are described by names for their dims, e.g. ("heads", "d"). Four names are split over
ranks; every other one is whole on each rank. Splits as data keep the model file free of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows `start:stop` of a dim, stored from row `offset` on."""

    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Span:
    """Rows `start:stop` of a dim of `full` rows, stored in `padded` rows on this rank.

    pieces: where they are stored, by default from the first row on; the rest of the rows is zero.
    """

    start: int
    stop: int
    full: int
    padded: int
    pieces: tuple[Piece, ...] = ()

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def stored(self) -> tuple[Piece, ...]:
        return self.pieces or (Piece(self.start, self.stop, 0),)


def whole(full: int) -> Span:
    return Span(0, full, full, full)


def split_even(full: int, rank: int, size: int) -> Span:
    """Contiguous parts that differ by at most one row."""
    start, stop = full * rank // size, full * (rank + 1) // size
    return Span(start, stop, full, stop - start)


def split_vocab(full: int, rank: int, size: int) -> Span:
    """Equal parts of ceil(full / size) rows; the last ranks pad what is missing."""
    per_rank = -(-full // size)
    start, stop = min(full, rank * per_rank), min(full, (rank + 1) * per_rank)
    return Span(start, stop, full, per_rank)


def split_heads(
    heads: int, kv_heads: int, head_dim: int, rank: int, size: int
) -> tuple[Span, Span]:
    """The query heads of a rank, and the key and value heads that they attend to.

    Each kv head of a rank serves as many query heads as any other there, the last of which may be
    padding: zeros, which add nothing to what attention gives. A kv head whose query heads are on
    several ranks is held by each of them, and twice by a rank where that takes less padding.
    """
    held = _shares(heads, kv_heads, size)[rank]
    slots = max((share.size for share in held), default=1)  # for queries, of each kv head
    queries = tuple(
        Piece(share.start * head_dim, share.stop * head_dim, index * slots * head_dim)
        for index, share in enumerate(held)
    )
    kv = tuple(
        Piece(share.kv_head * head_dim, (share.kv_head + 1) * head_dim, index * head_dim)
        for index, share in enumerate(held)
    )
    n_kv = max(1, len(held))
    return (
        _of_pieces(queries, heads * head_dim, n_kv * slots * head_dim),
        _of_pieces(kv, kv_heads * head_dim, n_kv * head_dim),
    )


def _of_pieces(pieces: tuple[Piece, ...], full: int, padded: int) -> Span:
    if not pieces:
        return Span(0, 0, full, padded)
    return Span(pieces[0].start, pieces[-1].stop, full, padded, pieces)


class _Heads(NamedTuple):
    """A kv head, and the query heads start:stop of those that attend to it."""

    kv_head: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@lru_cache
def _shares(heads: int, kv_heads: int, size: int) -> tuple[tuple[_Heads, ...], ...]:
    """The heads of each rank, dealt such that the fullest rank stores least.

    The query heads of each kv head are cut into the same number of parts, and the parts dealt out
    evenly and in order; of the few numbers of parts that can come out well, the best is taken.
    """
    queries_per_kv = heads // kv_heads
    per_kv_head = (size // kv_heads, -(-size // kv_heads), size // math.gcd(size, kv_heads))
    numbers = {n for n in (1, 2, 3, 4, *per_kv_head) if 1 <= n <= min(queries_per_kv, size)}

    def dealt(n_parts: int) -> tuple[tuple[_Heads, ...], ...]:
        bounds = [queries_per_kv * part // n_parts for part in range(n_parts + 1)]
        parts = [
            _Heads(kv, kv * queries_per_kv + start, kv * queries_per_kv + stop)
            for kv in range(kv_heads)
            for start, stop in pairwise(bounds)
        ]
        cuts = [len(parts) * rank // size for rank in range(size + 1)]
        shares = (tuple(parts[start:stop]) for start, stop in pairwise(cuts))
        return tuple(min(_joined(share), share, key=_n_stored) for share in shares)

    def cost(shares: Sequence[Sequence[_Heads]]) -> tuple[int, int]:
        stored = [_n_stored(share) for share in shares]
        return max(stored), sum(stored)

    return min(map(dealt, sorted(numbers)), key=cost)


def _joined(share: Sequence[_Heads]) -> tuple[_Heads, ...]:
    """A rank's parts, those of one kv head as one."""
    by_kv_head = groupby(share, key=lambda part: part.kv_head)
    parts = [(kv_head, list(same)) for kv_head, same in by_kv_head]
    return tuple(_Heads(kv_head, same[0].start, same[-1].stop) for kv_head, same in parts)


def _n_stored(share: Sequence[_Heads]) -> int:
    """Heads that a rank stores: queries with their padding, and kv heads, in weights and cache."""
    return len(share) * (1 + max((part.size for part in share), default=0))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a checkpoint stores it: its name there, and the names of its dims."""

    name: str
    dims: tuple[str, ...]

    def spans(self, spans: Mapping[str, Span]) -> tuple[Span, ...]:
        """The span of each dim, from those of a rank by name."""
        return tuple(spans[dim] for dim in self.dims)

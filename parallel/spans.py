"""Which part of a full tensor a rank holds.

Tensors are described by names for their dims, e.g. ("heads", "d"). Four names are split over
ranks; every other one is whole on each rank. Splits as data keep the model file free of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Rows `start:stop` of a dim of `full` rows, stored in `padded` rows on this rank."""

    start: int
    stop: int
    full: int
    padded: int

    @property
    def size(self) -> int:
        return self.stop - self.start


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


def split_heads(heads: int, head_dim: int, rank: int, size: int) -> Span:
    """Whole heads only. Raises ValueError where `size` does not divide them."""
    if heads % size:
        raise ValueError(
            f"{size} ranks cannot share {heads} attention heads: use a rank count that divides it"
        )
    per_rank = heads // size * head_dim
    return Span(rank * per_rank, (rank + 1) * per_rank, heads * head_dim, per_rank)


def split_kv_heads(kv_heads: int, head_dim: int, rank: int, size: int) -> Span:
    """As `split_heads`, but where ranks exceed KV heads, neighbouring ranks hold the same one."""
    if size <= kv_heads:
        return split_heads(kv_heads, head_dim, rank, size)
    if size % kv_heads:
        raise ValueError(
            f"{size} ranks cannot replicate {kv_heads} KV heads evenly: "
            f"use a rank count that is a multiple of {kv_heads}, or at most {kv_heads}"
        )
    head = rank // (size // kv_heads)
    return Span(head * head_dim, (head + 1) * head_dim, kv_heads * head_dim, head_dim)


@dataclass(frozen=True)
class Placed:
    """One tensor of a checkpoint and the names of its dims."""

    source: str
    dims: tuple[str, ...]

    def spans(self, spans: Mapping[str, Span]) -> tuple[Span, ...]:
        return tuple(spans[dim] for dim in self.dims)

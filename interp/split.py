"""Pairs split in two, so that a vector is never measured on questions that it was made from."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from .pairs import Pair

SomePair = TypeVar("SomePair", bound=Pair)

# The beginning of a line in a list of options: "(A)", "A.", "(1):".
_OPTION_MARK = re.compile(r"^\s*(?:\(\w\):?|\w[.:)])(?=\s|$)")


def split_pairs(
    pairs: Sequence[SomePair], share: float, seed: int
) -> tuple[list[SomePair], list[SomePair]]:
    """`pairs` shuffled by `seed` and split in two, the first part about `share` of them.

    Pairs that ask the same question, even with its options in another order, stay together. The
    parts depend on the texts and the seed, not on the order of `pairs`. Raises ValueError when a
    part would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of pairs for the first part is {share}; it is between 0 and 1")
    clusters = sorted(_clusters(pairs), key=lambda cluster: _shuffle_key(cluster, seed))
    first: list[SomePair] = []
    second: list[SomePair] = []
    for cluster in clusters:
        # A cluster goes where it leaves the first part nearer to its size.
        fits = len(first) + len(cluster) / 2 <= share * len(pairs)
        (first if fits else second).extend(cluster)
    if not first or not second:
        raise ValueError(
            f"{len(pairs)} pairs with {len(clusters)} different questions cannot be split "
            f"{share:g} to {1 - share:g}; give more questions, or another share"
        )
    return first, second


def _clusters(pairs: Sequence[SomePair]) -> list[list[SomePair]]:
    """The pairs in clusters that share a question, directly or by way of others."""
    parent: dict[object, object] = {}

    def root(subject: object) -> object:
        while parent.setdefault(subject, subject) != subject:
            parent[subject] = subject = parent[parent[subject]]
        return subject

    for pair in pairs:
        first, *others = _subjects(pair)
        for other in others:
            parent[root(other)] = root(first)
    clusters = defaultdict(list)
    for pair in pairs:
        clusters[root(_subjects(pair)[0])].append(pair)
    return list(clusters.values())


def _subjects(pair: Pair) -> list[object]:
    """The subjects of a pair: its questions, or both of its plain texts together."""
    if not pair.question:
        return [(pair.matching, pair.other)]
    return [_without_order(question) for question in dict.fromkeys(pair.questions)]


def _without_order(question: str) -> tuple[str, ...]:
    """The lines of a question without the marks of options, sorted."""
    lines = (_OPTION_MARK.sub("", line) for line in question.splitlines())
    return tuple(sorted(filter(None, (" ".join(line.split()) for line in lines))))


def _shuffle_key(cluster: Sequence[Pair], seed: int) -> bytes:
    """A key that sorts clusters into an order that only their texts and the seed decide."""
    name = min(pair.key for pair in cluster)
    return hashlib.sha256(f"{seed} {name}".encode()).digest()

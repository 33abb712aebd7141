"""The content of a file of steering vectors, before anything is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..model.points import Tap
from ..model.summary import one_line


@dataclass(frozen=True)
class Origin:
    """Where vectors come from. Strings and numbers only, so that it can be written as JSON."""

    model: str = ""  # its fingerprint; of two models, both with a + between
    method: str = ""  # "mean_diff", "pca", "logistic", or how they were made: "gguf", "sum", ...
    positions: str = ""  # whose states they were made from: "label", "last", "mean", "contrast"
    n_pairs: int = 0
    pair_keys: tuple[str, ...] = ()  # 16 hex digits each, of the pairs they were made from

    __repr__ = one_line

    def joined(self, other: Origin, method: str) -> Origin:
        """The origin of vectors made from both: they have seen the pairs of either."""
        keys = tuple(dict.fromkeys((*self.pair_keys, *other.pair_keys)))
        models = dict.fromkeys(part for part in (self.model, other.model) if part)
        return Origin(
            model="+".join(models),
            method=method,
            positions=self.positions,
            n_pairs=len(keys) or self.n_pairs + other.n_pairs,
            pair_keys=keys,
        )


UNKNOWN_ORIGIN = Origin()


class VectorFields(NamedTuple):
    """The fields of `SteeringVectors`, as a file holds them."""

    vectors: dict[Tap, Tensor]  # [d] float32 each
    resid_norms: dict[Tap, float]
    n_layers: int
    origin: Origin

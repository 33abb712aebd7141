"""Propensities of items under many edits, all edits of an item in one pass.

A protocol turns a pair into a text that no edit touches, and continuations of it that are edited at
every position. The text is fed once; each edit (a tap, a vector, a scale) is one branch of it.
Propensity is how much the model prefers the matching answer:

    paper            logit(matching label) - logit(other label), at the token before the label,
                     which alone is edited                              (arXiv 2604.06483)
    steering-bench   Σ log-prob(matching answer) - Σ log-prob(other answer), edited from the
                     answer's first token on                            (Tan et al. 2024)

Where an answer begins with its label, an edit from there on could not reach it: then the edits of
steering-bench begin at the token before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.branches import padded, run_branches, shared_prefix
from ..kernels.edits import ADD, Edits
from ..model.cache import KVCache
from ..model.points import Tap
from ..model.tap_edits import TapEdits
from ..model.transformer import Transformer
from ..parallel.head_reduce import reduce_head, token_logits
from .prompts import PairIds, check_length

PROTOCOLS = ("paper", "steering-bench")
PASS_ROWS = 4096  # of all branches in one pass, which holds about twice as many in every block


@dataclass(frozen=True)
class Item:
    """A pair as a protocol measures it."""

    prefix: list[int]
    continuations: list[list[int]]  # one, or the matching and the other; all positions are edited
    label_ids: tuple[int, int]  # of the two answers; what follows a single continuation

    @classmethod
    def of(cls, pair: PairIds, protocol: str) -> Item:
        """The item of a pair. Raises ValueError for answers to two questions, which share no text
        to be fed once, and for a label without a token before it.
        """
        matching, other = pair.matching, pair.other
        label_at = matching.label_at
        assert label_at is not None
        if not label_at == other.label_at == pair.n_shared:
            raise ValueError("its answers follow different texts: a propensity is of one question")
        if label_at == 0:
            raise ValueError("a label has no token before it that could be edited")
        if protocol == "paper":
            start = label_at - 1
            return cls(matching.ids[:start], [[matching.ids[start]]], pair.label_ids)
        start = min(matching.answer_at, other.answer_at, label_at - 1)
        return cls(matching.ids[:start], [side.ids[start:] for side in pair.sides], pair.label_ids)


@dataclass(frozen=True)
class Variants:
    """E edits, each at one tap, that are tried separately; a scale of 0 changes nothing."""

    taps: list[Tap]  # E
    vectors: Tensor  # [n, d]
    rows: Tensor  # [E] int64, of `vectors`
    scales: Tensor  # [E] float32

    def part(self, start: int, stop: int) -> Variants:
        """The edits from start to stop."""
        return Variants(
            self.taps[start:stop], self.vectors, self.rows[start:stop], self.scales[start:stop]
        )

    def edits(self, rows_each: int) -> TapEdits:
        """The edits of E · rows_each rows; each edit has rows_each rows, one after another."""
        modes = torch.full(self.vectors.shape[:1], ADD, dtype=torch.int32, device=self.rows.device)
        scales = self.scales.repeat_interleave(rows_each)
        taps = [tap.canonical for tap in self.taps]
        by_tap = {}
        for tap in dict.fromkeys(taps):
            is_here = torch.tensor([other == tap for other in taps], device=self.rows.device)
            index = self.rows.where(is_here, -1).repeat_interleave(rows_each)
            by_tap[tap] = (Edits(self.vectors, modes, index, scales),)
        return TapEdits(by_tap)


@torch.no_grad()
def propensities(model: Transformer, item: Item, variants: Variants) -> Tensor:
    """The item's propensity under each edit: [E] float64 on the CPU, the same on every rank.

    Raises ValueError for an item that is longer than the context.
    """
    n_most = max(map(len, item.continuations))
    check_length(len(item.prefix) + n_most, model.config)
    cache = shared_prefix(model, item.prefix)
    rows_each = n_most * len(item.continuations)
    step = max(1, PASS_ROWS // rows_each)
    found = [
        _in_one_pass(model, cache, item, variants.part(start, start + step))
        for start in range(0, len(variants.taps), step)
    ]
    return torch.cat(found).double().cpu()


def _in_one_pass(model: Transformer, cache: KVCache, item: Item, variants: Variants) -> Tensor:
    """Propensities [E], float32 or float64, of edits that one pass has room for."""
    n_edits, ids = len(variants.taps), padded(item.continuations, model.device)
    n_texts, n_tokens = ids.shape
    hidden = run_branches(
        model, cache, ids.repeat(n_edits, 1), edits=variants.edits(n_texts * n_tokens)
    )  # [E * texts, T, d]
    if n_texts == 1:
        labels = torch.tensor(item.label_ids, device=model.device)
        logits = token_logits(model.norm(hidden[:, -1]), model.head, labels)
        return logits[:, 0] - logits[:, 1]
    lengths = torch.tensor(list(map(len, item.continuations)), device=model.device)
    sums = _log_probs(model, hidden.unflatten(0, (n_edits, n_texts)), ids, lengths)
    return sums[:, 0] - sums[:, 1]


def _log_probs(model: Transformer, hidden: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Σ log-prob of the tokens after the first: hidden [E, A, T, d], ids [A, T] -> [E, A]."""
    targets = ids[:, 1:]  # [A, T - 1]
    is_real = torch.arange(1, ids.shape[1], device=ids.device) < lengths[:, None]
    states = hidden[:, :, :-1].flatten(0, 2)
    result = reduce_head(
        model.norm(states), model.head, k=1, target_ids=targets.flatten().repeat(hidden.shape[0])
    )
    each = result.target_logprob.double().view(hidden.shape[0], *targets.shape)
    return each.where(is_real, 0).sum(-1)

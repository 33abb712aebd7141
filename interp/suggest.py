"""A layer to steer, suggested by the lens before anything is steered.

Where the lens of a layer already tells the answers of a question apart, the layer has a direction
for them that can be moved (Billa 2026, arXiv 2604.15557, who measures it for concepts with a known
right answer). A behaviour has none, so here a layer's accessibility is how far apart the lens of
its `resid_post` holds the two answers, in nats:

    accessibility = mean over pairs of |log p(one label) - log p(the other)|   before the label

The suggestion is the first layer within a tenth of the largest: among layers that are alike, it has
the most blocks after it to act on the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.branches import run_branches, shared_prefix
from ..engine.not_finite import refusal
from ..model.points import Tap
from ..model.tap_sink import RowTaps
from ..model.transformer import Transformer
from ..parallel.head_reduce import token_logits
from .prompts import PairIds, check_length

MOST_PAIRS = 64  # pairs that are read: enough for a mean
OF_THE_LARGEST = 0.9


class Suggestion(NamedTuple):
    """How accessible the answers are to the lens of each layer, and the tap to steer at."""

    accessibility: list[float]  # [L], nats
    tap: Tap


def suggest(model: Transformer, pairs: Sequence[PairIds]) -> Suggestion:
    """The suggestion of the first MOST_PAIRS pairs, the same on every rank.

    Raises ValueError for a pair that is longer than the context, or numbers that are not finite.
    """
    each = enumerate(pairs[:MOST_PAIRS], start=1)
    gaps = torch.stack([_finite(_gaps(model, pair), model, number) for number, pair in each])
    accessibility = gaps.mean(0)
    is_near = accessibility >= OF_THE_LARGEST * accessibility.max()
    return Suggestion(accessibility.tolist(), Tap(int(is_near.int().argmax()), "resid_post"))


@torch.no_grad()
def _gaps(model: Transformer, pair: PairIds) -> Tensor:
    """How far apart the lens of each layer holds the two labels: [L] float64, nats."""
    assert pair.matching.label_at is not None
    ids = pair.matching.ids[: pair.matching.label_at]
    check_length(len(ids), model.config)
    taps = [Tap(layer, "resid_post") for layer in range(model.config.n_layers)]
    last = torch.zeros(1, dtype=torch.int64, device=model.device)
    capture = RowTaps(taps, last, model.config.d, dtype=model.dtype)
    cache = shared_prefix(model, ids[:-1])
    run_branches(model, cache, torch.tensor([ids[-1:]], device=model.device), sink=capture)
    labels = torch.tensor(pair.label_ids, device=model.device)
    logits = token_logits(model.norm(capture.states[0]), model.head, labels).double().cpu()
    return (logits[:, 0] - logits[:, 1]).abs()  # log-probs differ by as much as logits


def _finite(gaps: Tensor, model: Transformer, number: int) -> Tensor:
    """The gaps of a pair. Raises ValueError, on every rank, where they are not finite."""
    if not gaps.isfinite().all():
        raise ValueError(refusal(model, f"the lenses of pair {number}"))
    return gaps

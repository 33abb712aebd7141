"""The states of a pair's answers, read in one pass in which the two are branches of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.branches import padded, run_branches, shared_prefix
from ..model.points import Tap
from ..model.tap_sink import RowTaps
from ..model.transformer import Transformer
from .prompts import PairIds, Side


def pair_states(model: Transformer, pair: PairIds, taps: Sequence[Tap], at: str) -> Tensor:
    """States of both sides [2, P, d], the matching side first; float64 means of the model's states.

    Means are over the positions of `read_span`.
    """
    return torch.stack([states.double().mean(0) for states in side_states(model, pair, taps, at)])


@torch.no_grad()
def side_states(
    model: Transformer, pair: PairIds, taps: Sequence[Tap], at: str
) -> tuple[Tensor, ...]:
    """The states [n, P, d] of either side at the n positions that represent it.

    The answers are branches of their shared prompt, or of its part before the first state read.
    """
    sides = pair.sides
    spans = [read_span(side, at) for side in sides]
    n_shared = min(pair.n_shared, *(span.start for span in spans))
    stop = max(span.stop for span in spans)  # nothing is read after it
    ids = padded([side.ids[n_shared:stop] for side in sides], model.device)
    rows = [
        torch.arange(span.start - n_shared, span.stop - n_shared) + branch * ids.shape[1]
        for branch, span in enumerate(spans)
    ]
    capture = RowTaps(taps, torch.cat(rows).to(model.device), model.config.d, dtype=model.dtype)
    cache = shared_prefix(model, sides[0].ids[:n_shared])
    run_branches(model, cache, ids, sink=capture)
    return capture.states.split([len(part) for part in rows])


def read_span(side: Side, at: str) -> range:
    """The positions whose states represent the side; at: one of AT.

    A mean leaves out position 0, whatever token it holds: models keep no meaning there, but a state
    of up to hundreds of times the others' norm for attention to fall back on (its sink). Raises
    ValueError where nothing else is there to read.
    """
    if at == "mean":
        span = range(max(1, side.answer_at), len(side.ids))
    else:
        position = len(side.ids) - 1 if at == "last" else side.label_at
        assert position is not None
        span = range(position, position + 1)
    if not span or span.start == 0:
        raise ValueError("nothing is to be read but position 0, whose state says nothing of a text")
    return span

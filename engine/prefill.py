"""Feed a prompt to the model, one chunk after another, and hand its states to the lens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.tap_edits import EditFn
from ..model.tap_sink import NO_TAPS, RowTaps
from ..model.transformer import Transformer
from .lens_plan import LensPlan
from .limits import CAPTURED_ROWS

# (positions, their states [N, P, d])
OnStates = Callable[[list[int], Tensor], None]


def prefill(
    model: Transformer,
    cache: KVCache,
    token_ids: Sequence[int],
    *,
    n_tokens: int,
    chunk: int,
    edits: EditFn | None = None,
    plan: LensPlan | None = None,
    wants: Callable[[int], bool] = lambda position: False,
    on_states: OnStates | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> None:
    """Fill the cache, of one request, with token_ids from position 0 on.

    n_tokens: how many the whole prompt has, of which the last may be left to a step.
    plan: the taps that are read at the positions that `wants` accepts; on_states gets their states
    chunk by chunk, with fewer positions where many taps are read. on_chunk(positions of the chunk)
    is called after each.
    """
    if plan is not None:
        chunk = min(chunk, max(1, CAPTURED_ROWS // len(plan.taps)))
    for start in range(0, len(token_ids), chunk):
        ids = token_ids[start : start + chunk]
        positions = [] if plan is None else list(filter(wants, range(start, start + len(ids))))
        sink = None
        if plan is not None and positions:
            rows = torch.tensor(positions, device=model.device) - start
            sink = RowTaps(plan.taps, rows, model.config.d, dtype=model.dtype)
        model(
            torch.tensor([ids], device=model.device),
            cache=cache,
            start=start,
            n_tokens=n_tokens,
            sink=sink or NO_TAPS,
            edits=edits,
        )
        if sink is not None and on_states is not None:
            on_states(positions, sink.states)
        if on_chunk is not None:
            on_chunk(len(ids))

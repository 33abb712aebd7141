"""Odd arguments at the doors to other people's models: right, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from odd import try_odd_values
from others import IDS, llama

from shardlens import Steering
from shardlens.interp import LensMonitor, Unembedding, steered, watch
from shardlens.parallel import vocab_slice

NORM, HEAD, STATES = torch.ones(8), torch.ones(31, 8), torch.ones(2, 8)
VECTOR = torch.ones(32)
BARE = Unembedding.of((NORM, 1e-6, HEAD))


def watched(model: Any = None, **options: Any) -> object:
    model = llama() if model is None else model
    with torch.no_grad(), watch(model, **options) as watching:
        model(IDS)
    return watching.states


def edited(steering: Any, **options: Any) -> object:
    model = llama()
    with torch.no_grad(), steered(model, steering, **options):
        return model(IDS).logits


def monitored(step: Any = 0, targets: Any = None, **options: Any) -> object:
    model, found = llama(), []
    monitor = LensMonitor(model, **{"every": 1, "to": found.append, **options})
    with torch.no_grad(), monitor.at(step, targets):
        model(IDS)
    return found


DOORS: dict[str, Callable[[Any], Any]] = {
    "watch model": lambda v: watched("none" if v is None else v),
    "watch points": lambda v: watched(points=v),
    "watch layers": lambda v: watched(layers=v),
    "watch positions": lambda v: watched(positions=v),
    "watch most_bytes": lambda v: watched(most_bytes=v),
    "steered steering": edited,
    "steered prompt_length": lambda v: edited(Steering(VECTOR, 1), prompt_length=v),
    "Unembedding source": lambda v: Unembedding.of(v),
    "Unembedding weights": lambda v: Unembedding.of((NORM, 1e-6, v)),
    "Unembedding norm": lambda v: Unembedding.of((v, 1e-6, HEAD)).read(STATES),
    "Unembedding epsilon": lambda v: Unembedding.of((NORM, v, HEAD)),
    "Unembedding parallel": lambda v: Unembedding.of((NORM, 1e-6, HEAD), parallel=v),
    "Unembedding first_id": lambda v: Unembedding.of((NORM, 1e-6, HEAD), first_id=v),
    "Unembedding vocab_size": lambda v: Unembedding.of((NORM, 1e-6, HEAD), vocab_size=v),
    "Unembedding data_axes": lambda v: Unembedding.of((NORM, 1e-6, HEAD), data_axes=v),
    "read states": lambda v: BARE.read(v),
    "read top_k": lambda v: BARE.read(STATES, top_k=v),
    "read targets": lambda v: BARE.read(STATES, targets=v),
    "read kl_to_last": lambda v: BARE.read(STATES, kl_to_last=v),
    "head_row": lambda v: BARE.head_row(v),
    "head_rows": lambda v: BARE.head_rows(v),
    "vocab_slice": lambda v: vocab_slice(v),
    "LensMonitor every": lambda v: monitored(every=v),
    "LensMonitor layers": lambda v: monitored(layers=v),
    "LensMonitor positions": lambda v: monitored(positions=v),
    "LensMonitor to": lambda v: LensMonitor(llama(), to=v),
    "LensMonitor unembedding": lambda v: monitored(unembedding=v),
    "LensMonitor seed": lambda v: monitored(seed=v),
    "monitor targets": lambda v: monitored(targets=v),
}
EMPTY = [[], (), set(), range(0)]
TAKEN: dict[str, list[Any]] = {
    "watch layers": ["all", -1],
    "watch positions": ["all", -1],
    "watch most_bytes": [10**30],
    "steered prompt_length": [None],
    "Unembedding epsilon": [0.5, 2.0, np.float32(2.0), torch.tensor(2.0), 10**30],
    "Unembedding parallel": [None],
    "Unembedding first_id": [None],
    "Unembedding vocab_size": [None],
    "Unembedding data_axes": [None, "", "nonsense", "all", np.array(["x"]), *EMPTY],
    "read targets": [None],
    "read kl_to_last": [True, False],
    "LensMonitor every": [10**30],
    "LensMonitor layers": ["all", -1],
    "LensMonitor positions": [10**30],
    "LensMonitor to": [len, int],
    "vocab_slice": [torch.zeros(2, 2)],
    "LensMonitor unembedding": [None],
    "LensMonitor seed": [-1, 10**30],
    "monitor targets": [None],
}


@pytest.mark.parametrize("door", DOORS)
def test_odd_values_are_right_or_refused_in_one_line(door: str) -> None:
    try_odd_values(door, DOORS[door], TAKEN.get(door, []))

"""Requests as a digest: everything that decides what the ranks compute, however it was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..parallel.digest import Digest
from .lens_spec import LensSpec
from .request import Generation
from .steering import Steering
from .vectors import SteeringVectors


def add_requests(asked: Digest, generations: Sequence[Generation]) -> None:
    """Add requests that were checked. `Request.ends` is a function, and has no digest."""
    for generation in generations:
        request, config = generation.request, generation.config
        drawn = request.sampling
        asked.add(torch.tensor(generation.prompt), generation.max_new_tokens, generation.stop_ids)
        asked.add(drawn.temperature, drawn.top_k, drawn.top_p, drawn.seed)
        asked.add(request.ends is not None, request.lens is not None, len(generation.steering))
        if request.lens is not None:
            _add_lens(asked, request.lens, config)
        for steering in generation.steering:
            _add_edit(asked, steering, config)


def add_vectors(asked: Digest, vectors: SteeringVectors) -> None:
    """Add the vector at each tap, and the norm of the states there where it is known."""
    for tap in vectors.taps:
        asked.add(tap, vectors.at(tap), vectors.resid_norms.get(tap))


def _add_lens(asked: Digest, lens: LensSpec, config: ModelConfig) -> None:
    asked.add(lens.taps(config), lens.top_k, lens.targets, lens.positions, lens.mode)


def _add_edit(asked: Digest, steering: Steering, config: ModelConfig) -> None:
    taps = steering.taps(config.n_layers)
    asked.add(
        steering.mode, steering.positions, taps, [float(steering.scale_at(tap)) for tap in taps]
    )
    if isinstance(steering.vector, Tensor):
        asked.add(steering.vector)
    else:
        asked.add(*map(steering.vector_at, taps))

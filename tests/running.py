"""Texts continued by the engine alone, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardlens.engine import Engine, Request, Sampling, Steering
from shardlens.model import Transformer


def continued(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """Whole texts, greedy, whatever token would end them."""
    requests = [Request(list(prompt), max_new_tokens, stop_ids=()) for prompt in prompts]
    generations = Engine(model).run(requests, **options)
    return [[*generation.prompt, *generation.tokens] for generation in generations]


def requests_of(
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sequence[Sampling] | None = None,
    steering: Sequence[Any] = (),
    **settings: Any,
) -> list[Request]:
    """A request per prompt; sampling: one each. steering: edits of all, or a list of them each."""
    n = len(prompts)
    each = [list(steering)] * n
    if steering and not isinstance(steering[0], Steering):
        each = [list(edits) for edits in steering]
    samplings = [Sampling()] * n if sampling is None else sampling
    return [
        Request(prompt, sampling=drawn, steering=edits, **settings)
        for prompt, drawn, edits in zip(prompts, samplings, each, strict=True)
    ]

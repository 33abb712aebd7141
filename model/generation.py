"""The generation loop: prefill in chunks, then one token per request and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .cache import KVCache
from .capture import Capture, Tap, no_capture
from .sampling import Sampling, next_tokens
from .transformer import Transformer

PREFILL_CHUNK = 256


class Observer(Protocol):
    """Looks at hidden states while a model runs, e.g. a lens."""

    taps: tuple[Tap, ...]

    def wants(self, position: int, prompt_length: int) -> bool:
        """Whether to copy the states of a token at absolute `position`."""
        ...

    def see(self, places: list[tuple[int, int]], states: Tensor) -> None:
        """States [N, P, d] of N (request, position) places, once each, in order of position."""
        ...


# (request, token id) as soon as a token is chosen
OnToken = Callable[[int, int], None]
# (positions fed to the model so far, the most there can be)
OnProgress = Callable[[int, int], None]


@torch.inference_mode()
def generate_tokens(
    model: Transformer,
    sequences: list[list[int]],
    *,
    max_new_tokens: int,
    samplings: Sequence[Sampling],
    stop_ids: frozenset[int] = frozenset(),
    observer: Observer | None = None,
    on_token: OnToken | None = None,
    on_progress: OnProgress | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> None:
    """Extend `sequences` (prompts as token ids) in place by up to max_new_tokens each.

    A request ends with a token of `stop_ids`, which is kept. Every rank runs the same loop and
    gets the same tokens. The last token of a request is never fed back, so the observer does not
    see its position. Raises ValueError for an empty prompt, an id outside the vocabulary, or a
    prompt that with max_new_tokens exceeds the model's context.
    """
    check_prompts(model, sequences, max_new_tokens)
    run = _Run(model, sequences, max_new_tokens, observer, on_progress)
    hidden = run.prefill(prefill_chunk)  # [B, d]
    active = set(range(len(sequences)))
    for step in range(max_new_tokens):
        tokens = next_tokens(model.norm(hidden), model.head, samplings, [step] * len(sequences))
        for request in sorted(active):
            sequences[request].append(tokens[request])
            if on_token is not None:
                on_token(request, tokens[request])
            if tokens[request] in stop_ids:
                active.discard(request)
        if not active or step == max_new_tokens - 1:
            break
        hidden = run.feed([[token] for token in tokens], active)[:, -1]


def check_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} is below 0")
    if not prompts:
        raise ValueError("there is no prompt")
    for number, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt:
            raise ValueError(f"{name} is empty: give at least one token")
        outside = [token for token in prompt if not 0 <= token < model.config.vocab_size]
        if outside:
            raise ValueError(
                f"{name} holds token id {outside[0]}, outside the vocabulary "
                f"of {model.config.vocab_size}"
            )
        if len(prompt) + max_new_tokens > model.config.context:
            raise ValueError(
                f"{name} has {len(prompt)} tokens; with {max_new_tokens} new ones that exceeds "
                f"the model's context of {model.config.context}"
            )


class _Run:
    """A batch in flight: its cache, and what the observer is shown."""

    def __init__(
        self,
        model: Transformer,
        sequences: list[list[int]],
        max_new_tokens: int,
        observer: Observer | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.model, self.observer, self.on_progress = model, observer, on_progress
        self.prompts = [list(sequence) for sequence in sequences]
        self.longest = max(map(len, sequences))
        self.cache: KVCache = model.new_cache(len(sequences), self.longest + max_new_tokens)

    def prefill(self, chunk: int) -> Tensor:
        """Feed all prompts; returns the state [B, d] at each one's last token."""
        last: list[Tensor | None] = [None] * len(self.prompts)
        for start in range(0, self.longest, chunk):
            parts = [prompt[start : start + chunk] for prompt in self.prompts]
            active = {request for request, part in enumerate(parts) if part}
            hidden = self.feed(parts, active)
            for request in active:
                at = len(self.prompts[request]) - 1 - start
                if at < chunk:
                    last[request] = hidden[request, at].clone()
        return torch.stack([row for row in last if row is not None])

    def feed(self, parts: Sequence[Sequence[int]], active: set[int]) -> Tensor:
        """Run the next tokens of each request, right-padded; returns [B, T, d].

        Requests that are not active ride along, and neither advance nor are observed.
        """
        width = max(map(len, parts))
        padded = [[*part, *[0] * (width - len(part))] for part in parts]
        token_ids = torch.tensor(padded, device=self.model.device)
        counts = [len(part) if request in active else 0 for request, part in enumerate(parts)]
        places = self._observed(counts)
        if not places:
            return self._forward(token_ids, counts, None)
        rows = [
            request * width + position - self.cache.lengths[request] for request, position in places
        ]
        assert self.observer is not None
        capture = Capture(
            self.observer.taps,
            torch.tensor(rows, device=self.model.device),
            self.model.config.d,
            dtype=self.model.dtype,
        )
        hidden = self._forward(token_ids, counts, capture)
        self.observer.see(places, capture.states)
        return hidden

    def _forward(self, token_ids: Tensor, counts: list[int], capture: Capture | None) -> Tensor:
        hidden: Tensor = self.model(
            token_ids, cache=self.cache, counts=counts, capture=capture or no_capture
        )
        if self.on_progress is not None:
            self.on_progress(max(self.cache.lengths), self.cache.capacity)
        return hidden

    def _observed(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        if self.observer is None:
            return []
        return [
            (request, position)
            for request, (start, count) in enumerate(zip(self.cache.lengths, counts, strict=True))
            for position in range(start, start + count)
            if self.observer.wants(position, len(self.prompts[request]))
        ]

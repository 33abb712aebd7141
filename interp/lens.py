"""The logit lens: what the model's own head says of any hidden state (nostalgebraist, 2020).

    logits = W_U · norm_f(h)          h: a tapped state, norm_f: the model's own final norm

The lens of the last `resid_post` is the model's output. States are decoded in blocks of positions
and streamed over the vocabulary, so memory does not grow with the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..model.capture import POINTS, Tap
from ..model.config import ModelConfig
from ..model.transformer import Transformer
from ..parallel.winners import reduce_head
from .trace import Trace

Layers = Literal["all"] | str | Sequence[int]
POSITIONS = ("all", "prompt", "generated", "last")
# States waiting to be decoded together; the head's weight is read once for all of them.
DECODE_BLOCK = 64


@dataclass(frozen=True)
class LensSpec:
    """Which states to decode, and what to say of them.

    points: of `POINTS`. layers: "all", or block numbers, as a sequence or as text like
    "0-3,8,-1" (negative counts from the end). top_k: winners kept. targets: whose log-prob and
    rank to report: "next" (the token that follows), a token id, or None. positions: "all"; those
    of the "prompt"; "generated", the positions whose prediction was a generated token, so from
    the prompt's last on; or "last", the prompt's last alone.
    """

    points: Sequence[str] = ("resid_post",)
    layers: Layers = "all"
    top_k: int = 5
    targets: Literal["next"] | int | None = "next"
    positions: str = "all"

    def taps(self, config: ModelConfig) -> tuple[Tap, ...]:
        """The places to read, in the order in which data passes through them.

        Raises ValueError naming a point or layer that the model does not have.
        """
        for point in self.points:
            if point not in POINTS:
                raise ValueError(f"point {point} does not exist: there are {', '.join(POINTS)}")
        if not self.points:
            raise ValueError("no point is given")
        layers = parse_layers(self.layers, config.n_layers)
        points = [point for point in POINTS if point in self.points]
        return tuple(Tap(layer, point) for layer in layers for point in points)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for anything the model cannot answer."""
        self.taps(config)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions {self.positions}: there are {', '.join(POSITIONS)}")
        if not 1 <= self.top_k <= config.vocab_size:
            raise ValueError(f"top_k {self.top_k} is outside 1 to {config.vocab_size}")
        if isinstance(self.targets, int) and not 0 <= self.targets < config.vocab_size:
            raise ValueError(
                f"target {self.targets} is outside the vocabulary of {config.vocab_size}"
            )


def parse_layers(layers: Layers, n_layers: int) -> list[int]:
    """Block numbers in order, without repeats. Raises ValueError naming what does not exist."""
    if isinstance(layers, str):
        numbers = list(range(n_layers)) if layers == "all" else _parse_ranges(layers, n_layers)
    else:
        numbers = list(layers)
    for number in numbers:
        if not -n_layers <= number < n_layers:
            raise ValueError(
                f"layer {number} does not exist: the model has layers 0 to {n_layers - 1}"
            )
    if not numbers:
        raise ValueError("no layer is given")
    return sorted({number % n_layers for number in numbers})


def _parse_ranges(text: str, n_layers: int) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(-?\d+))?\s*", part)
        if match is None:
            raise ValueError(f"layers {text!r} cannot be read: write all, or e.g. 0-3,8,-1")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if match[2] is not None:
            first, last = (number % n_layers if number < 0 else number for number in (first, last))
            if last < first:
                raise ValueError(f"layers {part.strip()} runs backwards")
        numbers += range(first, last + 1) if last < n_layers else [last]
    return numbers


class LensRecorder:
    """Observer of a generation loop that decodes what it sees into one Trace per request.

    `sequences` is the loop's own list, which grows as tokens are chosen. A state whose following
    token is not known yet waits, because that token may be its target.
    """

    def __init__(self, model: Transformer, spec: LensSpec, sequences: list[list[int]]) -> None:
        spec.check(model.config)
        self.model, self.spec, self.sequences = model, spec, sequences
        self.reported = spec.taps(model.config)
        final = Tap(model.config.n_layers - 1, "resid_post")
        # KL is measured from the final layer, which rides along as the last tap of each position
        self.taps = self.reported if self.reported[-1] == final else (*self.reported, final)
        self.traces = [Trace.empty(self.reported, spec.top_k) for _ in sequences]
        self._places: list[tuple[int, int]] = []
        self._states: list[Tensor] = []

    def wants(self, position: int, prompt_length: int) -> bool:
        last_of_prompt = prompt_length - 1
        if self.spec.positions == "prompt":
            return position <= last_of_prompt
        if self.spec.positions == "generated":
            return position >= last_of_prompt
        return self.spec.positions == "all" or position == last_of_prompt

    def see(self, places: list[tuple[int, int]], states: Tensor) -> None:
        self._places += places
        self._states.append(states)
        if len(self._places) >= DECODE_BLOCK:
            self._decode([place for place in self._places if self._next_token(place) >= 0])

    def finish(self) -> list[Trace]:
        """Decode what waits; the traces, one per request, with the ids of their whole text."""
        self._decode(self._places)
        for trace, sequence in zip(self.traces, self.sequences, strict=True):
            trace.input_ids = list(sequence)
        return self.traces

    def _next_token(self, place: tuple[int, int]) -> int:
        request, position = place
        sequence = self.sequences[request]
        return sequence[position + 1] if position + 1 < len(sequence) else -1

    @torch.inference_mode()
    def _decode(self, places: list[tuple[int, int]]) -> None:
        if not places:
            return
        chosen = set(places)
        states = torch.cat(self._states)  # [N, P, d]
        index = [at for at, place in enumerate(self._places) if place in chosen]
        kept = [at for at, place in enumerate(self._places) if place not in chosen]
        waiting = states[kept]
        for start in range(0, len(index), DECODE_BLOCK):
            block = index[start : start + DECODE_BLOCK]
            self._decode_block([self._places[at] for at in block], states[block])
        self._places = [self._places[at] for at in kept]
        self._states = [waiting]

    def _decode_block(self, places: list[tuple[int, int]], states: Tensor) -> None:
        n_taps, d = states.shape[1:]
        targets = torch.tensor([self._target(place) for place in places], device=states.device)
        winners = reduce_head(
            self.model.norm(states.view(-1, d)),
            self.model.head,
            k=self.spec.top_k,
            target_ids=targets.repeat_interleave(n_taps),
            group_size=n_taps,
        )
        for request, trace in enumerate(self.traces):
            rows = [at for at, place in enumerate(places) if place[0] == request]
            if rows:
                positions = [places[at][1] for at in rows]
                trace.extend(positions, targets[rows], winners, rows, n_taps)

    def _target(self, place: tuple[int, int]) -> int:
        if self.spec.targets is None:
            return -1
        return self._next_token(place) if self.spec.targets == "next" else int(self.spec.targets)

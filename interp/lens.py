"""The logit lens: what the model's own head says of any hidden state (nostalgebraist, 2020).

    logits = W_U · norm_f(h)          h: a tapped state, norm_f: the model's own final norm

The lens of the last `resid_post` is the model's output. States of a prompt are decoded in blocks
of positions and streamed over the vocabulary, so memory does not grow with the length of the text;
states of a decode step ride along in the step's own product (see model/step.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.generation import Place
from ..engine.lens_spec import LensSpec
from ..engine.limits import DECODED_POSITIONS
from ..engine.record import pack, width
from ..engine.step import Reader, TargetKind
from ..model.points import Tap
from ..model.transformer import Transformer
from ..parallel.head_reduce import reduce_head
from .trace import Trace

KEPT_PIECES = 64

# (request, the newly read positions of it)
OnLens = Callable[[int, Trace], None]


class _Kept:
    """What was read of one request: packed rows take less room than traces, blocks than pieces."""

    def __init__(self) -> None:
        self.positions, self.targets = array("q"), array("q")
        self.blocks: list[Tensor] = []  # [n, P, width]
        self.recent: list[Tensor] = []

    def add(self, positions: list[int], targets: list[int], rows: Tensor) -> None:
        self.positions.extend(positions)
        self.targets.extend(targets)
        self.recent.append(rows)
        if len(self.recent) == KEPT_PIECES:
            self.blocks.append(torch.cat(self.recent))
            self.recent = []


class LensRecorder:
    """Observer of a generation loop that makes one Trace per request.

    `sequences` is the loop's own list, which grows as tokens are chosen. With on_lens, what is
    read is handed over piece by piece instead, and not kept.
    """

    def __init__(
        self,
        model: Transformer,
        spec: LensSpec,
        sequences: list[list[int]],
        on_lens: OnLens | None = None,
    ) -> None:
        spec.check(model.config)
        self.model, self.spec, self.sequences, self.on_lens = model, spec, sequences, on_lens
        self.reported = spec.taps(model.config)
        final = Tap(model.config.n_layers - 1, "resid_post")
        # KL is measured from the final layer, which rides along as the last tap of each position
        taps = self.reported if self.reported[-1] == final else (*self.reported, final)
        self.reader = Reader(taps, spec.top_k, self._target_kind(), spec.mode == "deferred")
        self.reads_steps = spec.positions in ("all", "generated")
        self.fixed_target = spec.targets if isinstance(spec.targets, int) else -1
        self.kept = [_Kept() for _ in sequences]

    def _target_kind(self) -> TargetKind:
        if self.spec.targets is None:
            return "none"
        return "next" if self.spec.targets == "next" else "fixed"

    def wants(self, position: int, prompt_length: int) -> bool:
        last_of_prompt = prompt_length - 1
        if self.spec.positions in ("generated", "last"):
            return position == last_of_prompt
        return True

    def decode(self, states: Tensor, following: Tensor) -> Tensor:
        """See `Observer`."""
        blocks = zip(
            states.split(DECODED_POSITIONS), following.split(DECODED_POSITIONS), strict=True
        )
        return torch.cat([self._decode_block(block, after) for block, after in blocks])

    def _decode_block(self, states: Tensor, following: Tensor) -> Tensor:
        n_taps, d = states.shape[1:]
        winners = reduce_head(
            self.model.norm(states.reshape(-1, d)),
            self.model.head,
            k=self.spec.top_k,
            target_ids=self._target_ids(following, n_taps),
            group_size=n_taps,
        )
        return pack(winners, self.spec.top_k).unflatten(0, (-1, n_taps))

    def _target_ids(self, following: Tensor, n_taps: int) -> Tensor | None:
        if self.reader.target == "none":
            return None
        if self.reader.target == "fixed":
            following = torch.full_like(following, self.fixed_target)
        return following.repeat_interleave(n_taps)

    def take(self, places: list[Place], rows: Tensor) -> None:
        """See `Observer`."""
        for request in dict.fromkeys(request for request, _ in places):
            index = [at for at, place in enumerate(places) if place[0] == request]
            positions = [places[at][1] for at in index]
            targets = [self._target(request, position) for position in positions]
            own = rows[index, : len(self.reported)]
            if self.on_lens is None:
                self.kept[request].add(positions, targets, own)
            else:
                self.on_lens(request, Trace.of_rows(self.reported, positions, targets, own))

    def finish(self) -> list[Trace]:
        """The traces, one per request, with the ids of their whole text."""
        traces = []
        nothing = torch.empty((0, len(self.reported), width(self.spec.top_k)), dtype=torch.int32)
        for kept, sequence in zip(self.kept, self.sequences, strict=True):
            rows = torch.cat([nothing, *kept.blocks, *kept.recent])
            trace = Trace.of_rows(self.reported, list(kept.positions), list(kept.targets), rows)
            trace.input_ids = list(sequence)
            traces.append(trace)
        return traces

    def _target(self, request: int, position: int) -> int:
        if self.spec.targets != "next":
            return self.fixed_target
        sequence = self.sequences[request]
        return sequence[position + 1] if position + 1 < len(sequence) else -1

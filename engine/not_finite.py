"""Numbers that are not finite are refused: by the tensor, the edit or the dtype that caused them.

A good run pays nothing for it. What is wrong shows in numbers that are on the host anyway, on all
ranks alike; then all of them look for the cause together.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.points import POINTS, Tap
from ..model.tap_edits import EditFn
from ..model.tap_sink import TapSink
from ..model.transformer import Transformer
from ..model.weight_check import weight_not_finite
from ..parallel.collectives import exchange
from .limits import PREFILL_CHUNK
from .request import Generation
from .step import DecodeStep
from .tap_names import tap_name

NAME_BYTES = 256  # of a tensor, sent from rank to rank


class NotFinite(Exception):
    """A request's numbers at a position: of its lens at `tap`, or the model's own where it is None.

    Raised on every rank by what all have alike.
    """

    def __init__(self, generation: Generation, position: int, tap: Tap | None = None) -> None:
        super().__init__(generation.number, position, tap)
        self.generation, self.position, self.tap = generation, position, tap

    def described(self, *, is_alone: bool) -> str:
        """The beginning of the message; is_alone: the request is the only one of its call."""
        at = f"at position {self.position}"
        if not is_alone:
            at += f" of prompt {self.generation.number}"
        if self.tap is None:
            return f"the logits {at} are not finite"
        return f"the lens of {tap_name(self.tap)} {at} is not finite"


def refusal(model: Transformer, subject: str) -> str:
    """One line on numbers, of no edit, that are not finite; the same on every rank.

    Every rank must call it. subject: the numbers, such as "the states of pair 3".
    """
    return f"{subject} are not finite: {_weight_cause(model) or _range_cause(model)}"


def range_advice(model: Transformer) -> str:
    """The other way out where an edit is too large, at the end of a message."""
    return ", or run the model in bfloat16 or float32" if model.dtype == torch.float16 else ""


def on_all_ranks(holds: bool, model: Transformer) -> bool:
    """Whether it holds on every rank, where ranks might differ. Every rank must call it."""
    return all(seen == b"\1" for seen in exchange(bytes([holds]), model.parallel))


@torch.inference_mode()
def cause(found: NotFinite, step: DecodeStep, *, is_alone: bool) -> str:
    """One line that says why a request's numbers are not finite; the same on every rank.

    Every rank must call it. The text is read once more, without its edits and with them, in the
    memory of the step's first slot.
    """
    why = _weight_cause(step.model) or _cause_of_run(found, step)
    return f"{found.described(is_alone=is_alone)}: {why}"


def _cause_of_run(found: NotFinite, step: DecodeStep) -> str:
    """An edit, where everything is finite without the edits; else the dtype's range."""
    bad = _first_bad(found, step, None)
    if not found.generation.steering or not on_all_ranks(bad is None, step.model):
        return _range_cause(step.model, bad)
    assert step.edits is not None
    step.edits.put(0, found.generation.edits)
    bad = _first_bad(found, step, step.edits.slot(0).at)
    if bad is None:  # not seen again, in other roundings
        return _range_cause(step.model)
    return _edit_cause(found.generation, bad, step.model)


def _weight_cause(model: Transformer) -> str | None:
    """The first tensor that is not finite on some rank, and the ranks that hold it."""
    name = (weight_not_finite(model) or "").encode()
    seen = exchange(name[:NAME_BYTES].ljust(NAME_BYTES, b"\0"), model.parallel)
    bad = [name for name in seen if name.strip(b"\0")]
    if not bad:
        return None
    ranks = [str(rank) for rank, name in enumerate(seen) if name == bad[0]]
    tensor = bad[0].rstrip(b"\0").decode(errors="replace")
    return (
        f"{tensor} holds NaN or infinity on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}: "
        "get the checkpoint anew, or mend that tensor"
    )


def _range_cause(model: Transformer, bad: _BadState | None = None) -> str:
    """The dtype is to blame, as the weights are finite; bad: where its range is left first."""
    dtype = str(model.dtype).removeprefix("torch.")
    where = "a number" if bad is None else str(bad)
    if model.dtype == torch.float16:
        return f"{where} is beyond the range of float16: run the model in bfloat16 or float32"
    return (
        f"{where} is beyond the range of {dtype}, although every weight is finite: check that the "
        "weights are those that belong to the config"
    )


def _edit_cause(generation: Generation, bad: _BadState, model: Transformer) -> str:
    """The edit that acts before the first state that is not finite, the strongest of several.

    Without the edits everything is finite.
    """
    edits = [
        (edited, steering)
        for steering in generation.steering
        for edited in steering.taps(model.config.n_layers)
    ]
    before = [edit for edit in edits if _order(edit[0]) <= _order(bad.tap)]
    edited, steering = max(before, key=lambda edit: (edit[1].move_at(edit[0]), _order(edit[0])))
    dtype = str(model.dtype).removeprefix("torch.")
    what, smaller = "takes states", "scale"
    if not torch.isfinite(steering.vector_at(edited).to(model.dtype)).all():
        what, smaller = "has a vector", "vector"
    return (
        f"{steering.described_at(edited)}, {what} beyond the range of {dtype}, first at {bad}: "
        f"choose a smaller {smaller}{range_advice(model)}"
    )


def _order(tap: Tap) -> tuple[int, int]:
    """By layer, then as data passes through its points."""
    layer, point = tap.canonical
    return layer, POINTS.index(point)


class _BadState(NamedTuple):
    """A state, the first in the order of computing that is not finite."""

    tap: Tap
    position: int

    def __str__(self) -> str:
        return f"{tap_name(self.tap)} at position {self.position}"


class _FirstBad(TapSink):
    """Finds that state, or one that is not finite once it is normed for the lens."""

    def __init__(self, model: Transformer, lens: Collection[Tap]) -> None:
        self.model = model
        final = Tap(model.config.n_layers, "resid_pre")
        self.normed = {final, *(tap.canonical for tap in lens)}
        self.start = 0  # position of the chunk
        self.bad: _BadState | None = None

    def read(self, tap: Tap, x: Tensor) -> None:
        if self.bad is not None:
            return
        is_finite = torch.isfinite(x[0]).all(-1)
        if tap in self.normed:
            is_finite &= torch.isfinite(self.model.norm(x[0])).all(-1)
        if not is_finite.all():
            is_post = tap.layer > 0 and tap.point == "resid_pre"  # as users know it
            named = Tap(tap.layer - 1, "resid_post") if is_post else tap
            self.bad = _BadState(named, self.start + int(is_finite.int().argmin()))


def _first_bad(found: NotFinite, step: DecodeStep, edits: EditFn | None) -> _BadState | None:
    """The first state that is not finite where a request's text so far is read under `edits`."""
    generation, model = found.generation, step.model
    sink = _FirstBad(model, () if generation.record is None else generation.record.taps)
    # the last new token is not fed
    tokens = generation.tokens[: max(0, generation.max_new_tokens - 1)]
    token_ids = [*generation.prompt, *tokens]
    cache = step.cache.slot(0)
    cache.keys.zero_()  # a masked NaN would still meet a zero weight
    cache.values.zero_()
    for start in range(0, len(token_ids), PREFILL_CHUNK):
        sink.start = start
        ids = torch.tensor([token_ids[start : start + PREFILL_CHUNK]], device=model.device)
        model(ids, cache=cache, start=start, n_tokens=len(token_ids), sink=sink, edits=edits)
    return sink.bad

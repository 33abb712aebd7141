"""States of a model that somebody else made, copied while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from ..model.arguments import integer, integers
from ..model.points import Layers, Tap
from ..parallel.layouts import whole_tensor
from .decoders import Decoder
from .hooks import install

Positions = Literal["all", "last"] | int | Sequence[int]
MOST_BYTES = 2**30  # that the copies of a pass may take


class Watch:
    """The states of the latest pass at some taps; see `watch`.

    Used as a context by itself, it may be opened and closed many times: where code is compiled
    after it was made, opening it compiles once more, and no further time.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        points: str | Sequence[str] = "resid_post",
        layers: Layers = "all",
        positions: Positions = "all",
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._decoder = Decoder.of(model)
        self.taps = self._decoder.taps(points, layers)
        self._positions = _checked(positions)
        self._most_bytes, self._held_bytes = integer(most_bytes, "most_bytes"), 0
        self._states: dict[Tap, Tensor] = {}
        self._is_open = self._in_pass = False
        self._hooks = install(self._decoder, self.taps, self)

    def __enter__(self) -> Watch:
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_open = self._in_pass = False

    def close(self) -> None:
        """Take the hooks out of the model; the states of the last pass stay."""
        self._is_open = self._in_pass = False
        self._hooks.close()

    @property
    def states(self) -> dict[Tap, Tensor]:
        """Copies [B, T, d] by tap, T the positions asked for, in the dtype of the pass.

        Raises ValueError where no pass has ended, or where compiled code passed by the hooks.
        """
        missing = [tap for tap in self.taps if tap not in self._states]
        if missing:
            tap = missing[0]
            raise ValueError(
                f"no state was seen at {tap.point} of layer {tap.layer}: either no pass has ended "
                "while the watch was open, or the model was compiled before the watch was made"
            )
        return dict(self._states)

    def stacked(self) -> Tensor:
        """The states of all taps as one tensor [B, T, P, d], which any lens reads."""
        states = self.states
        return torch.stack([states[tap] for tap in self.taps], -2)

    def begin(self) -> None:
        if self._is_open:
            self._states, self._held_bytes, self._in_pass = {}, 0, True

    def end(self) -> None:
        # what runs after it is recomputation for the backward pass
        self._in_pass = False

    def call(self, positions: Tensor | None) -> None:
        pass

    def visit(self, tap: Tap, x: Tensor) -> None:
        if not self._in_pass:
            return
        with torch.no_grad():
            copy = self.kept(tap, whole_tensor(x.detach()))
        self._held_bytes += copy.numel() * copy.element_size()
        if self._held_bytes > self._most_bytes:
            raise ValueError(
                f"the states of a pass take more than {self._most_bytes:,} bytes at {tap.point} of "
                f"layer {tap.layer}: name fewer layers, points or positions, or raise most_bytes"
            )
        self._states[tap] = copy

    def kept(self, tap: Tap, x: Tensor) -> Tensor:
        """A copy of what is kept of a state [B, T, d]."""
        return _rows(x, self._positions)


@contextmanager
def watch(
    model: nn.Module,
    *,
    points: str | Sequence[str] = "resid_post",
    layers: Layers = "all",
    positions: Positions = "all",
    most_bytes: int = MOST_BYTES,
) -> Iterator[Watch]:
    """Copy states of a model of transformers, torchtitan or our own while a block runs.

    points: some of POINTS. layers: as in `LensSpec`; "all" on a stage of a pipeline are its own.
    positions: "all", "last", or indices into the tokens of a pass. Each pass replaces the states of
    the one before it; passes that end in an error, and recomputation under activation
    checkpointing, leave nothing. Copies are detached, and whole where tensor parallelism has split
    a text (every rank must watch then). Edits are read where `steered` was entered before.

    Under torch.compile: a block that is compiled by itself is watched at resid_pre and resid_post
    at any time. Anything else must be compiled while the watch is open, or after a `Watch` was
    made; what was compiled before passes hooks by, and reading the states says so.

    At the end every hook is removed, whatever happened. Raises ValueError for a model that is not
    known, points and layers that do not exist, and states above most_bytes in a pass.
    """
    watching = Watch(
        model, points=points, layers=layers, positions=positions, most_bytes=most_bytes
    )
    try:
        with watching:
            yield watching
    finally:
        watching.close()


def _checked(positions: Positions) -> str | list[int]:
    if isinstance(positions, str):
        if positions not in ("all", "last"):
            raise ValueError(f"positions {positions!r}: give all, last, or indices of tokens")
        return positions
    found = integers(positions, "positions")
    if not found:
        raise ValueError("positions are an empty list: name at least one")
    return found


def _rows(x: Tensor, positions: str | list[int]) -> Tensor:
    """A copy of some positions of x [B, T, d]; a view would keep all of it alive."""
    if positions == "all":
        return x.clone()
    if positions == "last":
        return x[:, -1:].clone()
    assert isinstance(positions, list)
    for position in positions:
        if not -x.shape[1] <= position < x.shape[1]:
            raise ValueError(f"position {position} is outside a pass of {x.shape[1]} tokens")
    return x[:, positions]

"""The edits of a batch of requests, as tables in device memory.

The norm's kernel finds the vector of each row by itself. Nothing but the table's shape decides
what is launched: a captured decode step follows every other change without a new capture.

Edits of a request that meet at a tap and position act in the order of its list. So that each acts
on the result of the one before it, they act in passes: an edit's pass comes after those of all the
earlier edits that it meets. In one pass no two edits of a request meet; they are alternatives, of
which at most one applies to a position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.edits import MODES, Edits
from ..model.config import ModelConfig
from ..model.points import POINTS, Tap
from ..model.tap_edits import NO_EDITS, TapEdits
from .limits import rounded_up
from .steering import Steering

LEAST_ROWS = 8  # of a table, so that a few more edits fit a captured step
_NO_MASK = 0  # row of the mask without any position


class _TapEdit(NamedTuple):
    """One edit of a request at one of its taps."""

    number: int  # of the edit in the request's list
    steering: Steering
    tap: Tap
    pass_index: int
    alternative: int

    @property
    def content(self) -> tuple[int, Tap | None, str]:
        """The key by which edits share a row of vectors: same vector and mode."""
        is_lone = isinstance(self.steering.vector, Tensor)
        return id(self.steering.vector), None if is_lone else self.tap, self.steering.mode


class RequestEdits:
    """The edits of a request, each at each of its taps, in passes.

    capacity: positions up to which edits can meet.
    """

    def __init__(
        self, steerings: Sequence[Steering], prompt_length: int, capacity: int, n_layers: int
    ) -> None:
        self.steerings, self.capacity, self.prompt_length = steerings, capacity, prompt_length
        self.tap_edits = list(_tap_edits(steerings, self.masks(), n_layers))

    def masks(self) -> Tensor:
        """[edits, capacity] bool: the positions of each edit."""
        masks = [steering.mask(self.prompt_length, self.capacity) for steering in self.steerings]
        return torch.stack(masks) if masks else torch.zeros(0, self.capacity, dtype=torch.bool)


def _tap_edits(steerings: Sequence[Steering], masks: Tensor, n_layers: int) -> Iterator[_TapEdit]:
    """Every edit of a request at each of its taps; masks: see `RequestEdits`."""
    positions = masks.float()
    meets = (positions @ positions.T > 0).tolist()
    earlier: dict[Tap, list[tuple[int, int]]] = {}  # (number, pass) of edits at a tap
    for number, steering in enumerate(steerings):
        for tap in steering.taps(n_layers):
            here = earlier.setdefault(tap.canonical, [])
            pass_index = max((used + 1 for n, used in here if meets[number][n]), default=0)
            alternative = sum(used == pass_index for _, used in here)
            here.append((number, pass_index))
            yield _TapEdit(number, steering, tap, pass_index, alternative)


@dataclass(frozen=True)
class TableShape:
    """The part of the edits that a captured step depends on: points, and rounded-up sizes."""

    points: tuple[str, ...]
    n_passes: tuple[int, ...]  # of each point
    n_vectors: int  # of a request
    n_masks: int  # of a request
    n_alternatives: int

    @classmethod
    def of(cls, requests: Iterable[RequestEdits]) -> TableShape | None:
        """Room for the edits of any of the requests in any slot; None where none has an edit."""
        n_passes: dict[str, int] = {}
        n_vectors = n_masks = n_alternatives = 0
        for request in requests:
            for edit in request.tap_edits:
                point = edit.tap.canonical.point
                n_passes[point] = max(n_passes.get(point, 0), edit.pass_index + 1)
            n_vectors = max(n_vectors, len({edit.content for edit in request.tap_edits}))
            n_masks = max(n_masks, len(request.steerings))
            n_alternatives = max(n_alternatives, len(request.steerings))
        if not n_passes:
            return None
        points = tuple(point for point in POINTS if point in n_passes)
        return cls(
            points=points,
            n_passes=tuple(n_passes[point] for point in points),
            n_vectors=rounded_up(n_vectors, LEAST_ROWS),
            n_masks=rounded_up(n_masks, LEAST_ROWS),
            n_alternatives=rounded_up(n_alternatives),
        )

    def covers(self, other: TableShape) -> bool:
        """Whether a table of this shape has room for the content of one of the other shape."""
        n_passes = dict(zip(self.points, self.n_passes, strict=True))
        return (
            all(
                n_passes.get(point, 0) >= n
                for point, n in zip(other.points, other.n_passes, strict=True)
            )
            and self.n_vectors >= other.n_vectors
            and self.n_masks >= other.n_masks
            and self.n_alternatives >= other.n_alternatives
        )


class EditTable:
    """Edits of B requests: Z sites, which are the passes over all taps, and A alternatives each.

    every_site: whether passes without an edit are launched, too, as in a captured step, which must
    serve the edits of later requests. Otherwise only the edits that exist cost anything.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: TableShape,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        every_site: bool,
    ) -> None:
        self.config, self.shape, self.capacity = config, shape, capacity
        self.every_site = every_site
        self.sites = [
            (Tap(layer, point), pass_index)
            for point, n_passes in zip(shape.points, shape.n_passes, strict=True)
            for pass_index in range(n_passes)
            for layer in range(config.n_layers + 1)
        ]
        self._site_index = {site: index for index, site in enumerate(self.sites)}
        self._live: list[set[int]] = [set() for _ in range(batch)]  # sites with an edit, per slot
        size = (len(self.sites), shape.n_alternatives, batch)

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.vectors = zeros(batch * shape.n_vectors, config.d, dtype=dtype)
        self.modes = zeros(batch * shape.n_vectors, dtype=torch.int32)
        self.masks = zeros(1 + batch * shape.n_masks, capacity, dtype=torch.bool)
        self.row = zeros(*size, dtype=torch.int32)  # of `vectors`
        self.scale = zeros(*size, dtype=torch.float32)
        self.mask = zeros(*size, dtype=torch.int64)  # row of `masks`

    def slot(self, slot: int) -> EditTable:
        """The edits of one slot, in the same memory."""
        part = EditTable.__new__(EditTable)
        part.__dict__.update(self.__dict__)
        part._live = self._live[slot : slot + 1]
        for name in ("row", "scale", "mask"):
            setattr(part, name, getattr(self, name)[..., slot : slot + 1])
        return part

    def put(self, slot: int, request: RequestEdits | None) -> None:
        """Replace the edits of a slot by a request's, which the table's shape has room for.

        The edits must have passed `Steering.check`. None leaves the slot empty.
        """
        edits = [] if request is None else request.tap_edits
        row_of = self._put_vectors(slot, edits)
        first_mask = 1 + slot * self.shape.n_masks  # after _NO_MASK
        if request is not None:
            masks = request.masks()
            self.masks[first_mask : first_mask + len(masks), : request.capacity] = masks.to(
                self.masks.device
            )
        sites = [self._site_index[edit.tap.canonical, edit.pass_index] for edit in edits]
        self._live[slot].clear()
        self._live[slot].update(sites)
        alternatives = torch.tensor([edit.alternative for edit in edits])
        cells = (torch.tensor(sites, dtype=torch.int64), alternatives)
        _write(self.row[..., slot], cells, [row_of[edit.content] for edit in edits])
        _write(
            self.scale[..., slot],
            cells,
            [float(edit.steering.scale_at(edit.tap)) for edit in edits],
        )
        _write(self.mask[..., slot], cells, [first_mask + edit.number for edit in edits])

    def _put_vectors(
        self, slot: int, edits: Sequence[_TapEdit]
    ) -> dict[tuple[int, Tap | None, str], int]:
        """Fill the slot's rows of `vectors` and `modes`; the row of each content."""
        row_of: dict[tuple[int, Tap | None, str], int] = {}
        for edit in edits:
            if edit.content not in row_of:
                row = row_of[edit.content] = slot * self.shape.n_vectors + len(row_of)
                self.vectors[row] = edit.steering.vector_at(edit.tap).to(self.vectors)
                self.modes[row] = MODES.index(edit.steering.mode)
        return row_of

    def at(self, positions: Tensor) -> TapEdits:
        """The edits of rows at absolute positions [B, T], with nothing read on the host."""
        sites = range(len(self.sites)) if self.every_site else sorted(set().union(*self._live))
        if not sites:
            return NO_EDITS
        chosen = slice(None) if self.every_site else list(sites)
        row, scale, mask = (table[chosen] for table in (self.row, self.scale, self.mask))
        where = positions.clamp(max=self.capacity - 1)
        applies = self.masks[mask[..., None], where.expand(*mask.shape, -1)]  # [Z, A, B, T]
        # at most one alternative applies
        index = torch.where(applies, row[..., None], -1).amax(1).flatten(1)  # [Z, B * T]
        scale = torch.where(applies, scale[..., None], 0).sum(1).flatten(1)
        by_tap: dict[Tap, tuple[Edits, ...]] = {}
        for z, site in enumerate(sites):  # the passes of a tap are in order
            tap, _ = self.sites[site]
            edits = Edits(self.vectors, self.modes, index[z], scale[z])
            by_tap[tap] = (*by_tap.get(tap, ()), edits)
        return TapEdits(by_tap)


def _write(table: Tensor, cells: tuple[Tensor, Tensor], values: Sequence[float]) -> None:
    """Set a slot's table [Z, A] to zero but for `values` in the cells, in one copy."""
    host_table = torch.zeros(table.shape, dtype=table.dtype)
    if values:
        host_table[cells] = torch.tensor(values, dtype=table.dtype)
    table.copy_(host_table)

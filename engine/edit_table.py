"""The edits of a batch of requests, as tables in device memory.

The norm's kernel finds the vector of each row by itself. Nothing but the table's shape decides
what is launched: a captured decode step follows every other change without a new capture.

Edits of a request that meet at a place and position act in the order of its list. So that each
works on what the one before it made, they lie on levels: an edit's level is one above the highest
of the earlier edits that it meets, and the levels of a place are applied one after another. On one
level no two edits of a request meet; there they lie in slots, of which at most one applies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.edits import MODES, Edits
from ..model.config import ModelConfig
from ..model.points import POINTS, Tap
from ..model.tap_edits import TapEdits
from .limits import rounded_up
from .steering import Steering

LEAST_ROWS = 8  # of a table, so that a few more edits fit a captured step
_NO_PATTERN = 0  # the mask without any position


class _Placed(NamedTuple):
    """One edit at one of its places."""

    request: int
    number: int  # of the edit in the batch
    steering: Steering
    tap: Tap
    level: int
    slot: int

    @property
    def content(self) -> tuple[int, Tap | None, str]:
        """What edits share a row of vectors by: it is the same for the same vector and mode."""
        is_lone = isinstance(self.steering.vector, Tensor)
        return id(self.steering.vector), None if is_lone else self.tap, self.steering.mode


def _masks(
    steerings: Sequence[Sequence[Steering]], prompt_lengths: Sequence[int], capacity: int
) -> Tensor:
    """[edits of the batch, capacity] bool: the positions of each."""
    masks = [
        steering.mask(length, capacity)
        for own, length in zip(steerings, prompt_lengths, strict=True)
        for steering in own
    ]
    return torch.stack(masks) if masks else torch.zeros(0, capacity, dtype=torch.bool)


def _place(
    steerings: Sequence[Sequence[Steering]], masks: Tensor, n_layers: int
) -> Iterator[_Placed]:
    """Every edit at each of its places; masks: see `_masks`."""
    first = 0
    for request, own in enumerate(steerings):
        positions = masks[first : first + len(own)].float()
        meets = (positions @ positions.T > 0).tolist()
        earlier: dict[Tap, list[tuple[int, int]]] = {}  # (index, level) of edits at a place
        for index, steering in enumerate(own):
            for tap in steering.taps(n_layers):
                there = earlier.setdefault(tap.canonical, [])
                level = max((at + 1 for other, at in there if meets[index][other]), default=0)
                slot = sum(at == level for _, at in there)
                there.append((index, level))
                yield _Placed(request, first + index, steering, tap, level, slot)
        first += len(own)


@dataclass(frozen=True)
class TableShape:
    """What a captured step depends on: the points that are edited, and sizes, rounded up."""

    points: tuple[str, ...]
    n_levels: tuple[int, ...]  # of each point
    n_vectors: int
    n_patterns: int
    n_slots: int

    @classmethod
    def of(
        cls,
        steerings: Sequence[Sequence[Steering]],
        prompt_lengths: Sequence[int],
        capacity: int,
        config: ModelConfig,
    ) -> TableShape | None:
        """That of one list of edits a request; None where nothing is edited.

        capacity: that of the table, for edits count as meeting up to there.
        """
        masks = _masks(steerings, prompt_lengths, capacity)
        n_levels: dict[str, int] = {}
        contents = set()
        for placed in _place(steerings, masks, config.n_layers):
            point = placed.tap.canonical.point
            n_levels[point] = max(n_levels.get(point, 0), placed.level + 1)
            contents.add(placed.content)
        if not contents:
            return None
        points = tuple(point for point in POINTS if point in n_levels)
        return cls(
            points=points,
            n_levels=tuple(n_levels[point] for point in points),
            n_vectors=rounded_up(len(contents), LEAST_ROWS),
            n_patterns=rounded_up(len(masks) + 1, LEAST_ROWS),
            n_slots=rounded_up(max(map(len, steerings))),
        )

    def covers(self, other: TableShape) -> bool:
        """Whether a table of this shape has room for what one of the other holds."""
        own_levels = dict(zip(self.points, self.n_levels, strict=True))
        return (
            all(
                own_levels.get(point, 0) >= levels
                for point, levels in zip(other.points, other.n_levels, strict=True)
            )
            and self.n_vectors >= other.n_vectors
            and self.n_patterns >= other.n_patterns
            and self.n_slots >= other.n_slots
        )


class EditTable:
    """Edits of B requests: Z sites, which are the levels of all places, and S slots of each."""

    def __init__(
        self,
        config: ModelConfig,
        shape: TableShape,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.shape, self.capacity = config, shape, capacity
        self.sites = [
            (Tap(layer, point), level)
            for point, n_levels in zip(shape.points, shape.n_levels, strict=True)
            for level in range(n_levels)
            for layer in range(config.n_layers + 1)
        ]
        size = (len(self.sites), shape.n_slots, batch)

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.vectors = zeros(shape.n_vectors, config.d, dtype=dtype)
        self.modes = zeros(shape.n_vectors, dtype=torch.int32)
        self.masks = zeros(shape.n_patterns, capacity, dtype=torch.bool)
        self.row = zeros(*size, dtype=torch.int32)  # of `vectors`
        self.scale = zeros(*size, dtype=torch.float32)
        self.pattern = zeros(*size, dtype=torch.int64)  # row of `masks`

    @classmethod
    def of(
        cls,
        steerings: Sequence[Sequence[Steering]],
        prompt_lengths: Sequence[int],
        capacity: int,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> EditTable:
        """One for passes over texts of up to `capacity` positions, with at least one edit."""
        shape = TableShape.of(steerings, prompt_lengths, capacity, config)
        assert shape is not None
        table = cls(config, shape, len(steerings), capacity, dtype=dtype, device=device)
        table.fill(steerings, prompt_lengths)
        return table

    def first(self, batch: int) -> EditTable:
        """That of the first `batch` requests, in the same memory."""
        part = EditTable.__new__(EditTable)
        part.__dict__.update(self.__dict__)
        for name in ("row", "scale", "pattern"):
            setattr(part, name, getattr(self, name)[..., :batch])
        return part

    def fill(self, steerings: Sequence[Sequence[Steering]], prompt_lengths: Sequence[int]) -> None:
        """Replace all content: one list of edits a request, which the table's shape has room for.

        The edits must have passed `Steering.check`.
        """
        masks = _masks(steerings, prompt_lengths, self.capacity)
        site_of = {site: index for index, site in enumerate(self.sites)}
        rows: dict[tuple[int, Tap | None, str], int] = {}
        modes: list[int] = []
        placed = list(_place(steerings, masks, self.config.n_layers))
        for one in placed:
            if one.content not in rows:
                number = rows[one.content] = len(rows)
                self.vectors[number] = one.steering.vector_at(one.tap).to(self.vectors)
                modes.append(MODES.index(one.steering.mode))
        self.modes[: len(modes)] = torch.tensor(modes, dtype=torch.int32).to(self.modes.device)
        self.masks[1 : 1 + len(masks)] = masks.to(self.masks.device)
        where = [(site_of[one.tap.canonical, one.level], one.slot, one.request) for one in placed]
        at = torch.tensor(where, dtype=torch.int64).view(-1, 3).unbind(1)
        _write(self.row, at, [rows[one.content] for one in placed])
        _write(self.scale, at, [one.steering.scale_at(one.tap) for one in placed])
        _write(self.pattern, at, [one.number + 1 for one in placed])  # not _NO_PATTERN

    def at(self, positions: Tensor) -> TapEdits:
        """The edits of rows at absolute positions [B, T], with nothing read on the host."""
        where = positions.clamp(max=self.capacity - 1)
        batch_at = where[None, None].expand(*self.pattern.shape, -1)  # [Z, S, B, T]
        applies = self.masks[self.pattern[..., None], batch_at]
        # at most one slot applies
        index = torch.where(applies, self.row[..., None], -1).amax(1).flatten(1)  # [Z, B * T]
        scale = torch.where(applies, self.scale[..., None], 0).sum(1).flatten(1)
        by_place: dict[Tap, tuple[Edits, ...]] = {}
        for site, (place, _) in enumerate(self.sites):  # the levels of a place are in order
            edits = Edits(self.vectors, self.modes, index[site], scale[site])
            by_place[place] = (*by_place.get(place, ()), edits)
        return TapEdits(by_place)


def _write(table: Tensor, at: Sequence[Tensor], values: Sequence[float]) -> None:
    """Set the table to zero but for `values` at the indices `at`, in one copy to its device."""
    at_host = torch.zeros(table.shape, dtype=table.dtype)
    at_host[tuple(at)] = torch.tensor(values, dtype=table.dtype)
    table.copy_(at_host)

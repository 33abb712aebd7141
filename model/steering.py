"""Edits of hidden states by request, place and position, from tables in device memory.

A `Steering` says what to change where; an `EditTable` holds many of them so that the norm's kernel
finds the vector of each row by itself. Nothing but the table's size and which points it covers
decides what is launched: a captured decode step follows every other change without a new capture.

Positions are absolute: those of the text, whatever the chunk, the padding or the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.edits import MODES, Edits
from .config import ModelConfig
from .limits import rounded_up
from .points import POINTS, Layers, Tap, check_point, parse_layers

POSITION_RULES = ("all", "prompt", "generated", "last_prompt")
Rule = str | int | Sequence[int]
LEAST_ROWS = 8  # of a table, so that a few more edits fit a captured step
_NO_PATTERN = 0  # the mask without any position


@dataclass(frozen=True)
class Steering:
    """Edit `point` of `layers` with one vector, at some positions of a text.

    vector: [d]. layers: as in `LensSpec`. mode: one of kernels.edits.MODES; with "clamp", scale is
    the component that the state gets along the vector, else it multiplies the vector. positions:
    "all"; "prompt"; "generated", the positions of new tokens; "last_prompt", the prompt's last;
    a number, all from that position on; or a sequence of absolute positions.

    Raises ValueError for a vector that is not flat and finite, and for unknown words.
    """

    vector: Tensor
    layers: Layers = "all"
    point: str = "resid_post"
    mode: str = "add"
    scale: float = 1.0
    positions: Rule = "all"

    def __post_init__(self) -> None:
        check_point(self.point)
        if self.vector.ndim != 1:
            raise ValueError(f"a steering vector has one dim, not {list(self.vector.shape)}")
        if not self.vector.isfinite().all() or abs(self.scale) == float("inf"):
            raise ValueError("the steering vector or its scale is not finite")
        if self.scale != self.scale:
            raise ValueError("the steering scale is not a number")
        if self.mode not in MODES:
            raise ValueError(f"steering mode {self.mode}: there are {', '.join(MODES)}")
        if isinstance(self.positions, str) and self.positions not in POSITION_RULES:
            raise ValueError(
                f"steering positions {self.positions!r}: there are {', '.join(POSITION_RULES)}, "
                "a first position, or a list of positions"
            )

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for a vector of another width, or a layer that does not exist."""
        if self.vector.shape[0] != config.d:
            raise ValueError(
                f"the steering vector has {self.vector.shape[0]} numbers, the model {config.d}"
            )
        parse_layers(self.layers, config.n_layers)

    def places(self, n_layers: int) -> list[Tap]:
        return [Tap(layer, self.point).place for layer in parse_layers(self.layers, n_layers)]

    def mask(self, prompt_length: int, capacity: int) -> Tensor:
        """[capacity] bool: the positions that are edited."""
        at = torch.arange(capacity)
        if isinstance(self.positions, int):
            return at >= self.positions
        if not isinstance(self.positions, str):
            return torch.isin(at, torch.tensor(list(self.positions), dtype=torch.int64))
        return {
            "all": at >= 0,
            "prompt": at < prompt_length,
            "generated": at >= prompt_length,
            "last_prompt": at == prompt_length - 1,
        }[self.positions]


@dataclass(frozen=True)
class TableShape:
    """What a captured step depends on: sizes, rounded up, and the points that are edited."""

    points: tuple[str, ...]
    n_vectors: int
    n_patterns: int
    n_slots: int

    @classmethod
    def of(cls, steerings: Sequence[Sequence[Steering]]) -> TableShape | None:
        """That of one list of edits a request; None where nothing is edited."""
        every = [steering for own in steerings for steering in own]
        if not every:
            return None
        points = {Tap(0, steering.point).place.point for steering in every}
        return cls(
            points=tuple(point for point in POINTS if point in points),
            n_vectors=rounded_up(len(every), LEAST_ROWS),
            n_patterns=rounded_up(len(every) + 1, LEAST_ROWS),
            n_slots=rounded_up(max(map(len, steerings))),
        )

    def covers(self, other: TableShape) -> bool:
        """Whether a table of this shape has room for what one of the other holds."""
        sizes = zip(dataclasses.astuple(self)[1:], dataclasses.astuple(other)[1:], strict=True)
        return set(self.points) >= set(other.points) and all(own >= theirs for own, theirs in sizes)


class SiteEdits:
    """The edits of one forward pass, by place. The default is none anywhere."""

    def __init__(self, by_place: dict[Tap, Edits] | None = None) -> None:
        self._by_place = by_place or {}

    def at(self, place: Tap) -> Edits | None:
        return self._by_place.get(place)


NO_EDITS = SiteEdits()


class EditTable:
    """Edits of a batch of requests; Z places, S slots a place and request, B requests.

    Slots let a request have several edits at one place, at different positions each.
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
    ) -> None:
        self.config, self.shape, self.capacity = config, shape, capacity
        self.places = [
            Tap(layer, point) for point in shape.points for layer in range(config.n_layers + 1)
        ]
        sites = (len(self.places), shape.n_slots, batch)

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.vectors = zeros(shape.n_vectors, config.d, dtype=dtype)
        self.modes = zeros(shape.n_vectors, dtype=torch.int32)
        self.masks = zeros(shape.n_patterns, capacity, dtype=torch.bool)
        self.row = zeros(*sites, dtype=torch.int32)  # of `vectors`
        self.scale = zeros(*sites, dtype=torch.float32)
        self.pattern = zeros(*sites, dtype=torch.int64)  # row of `masks`

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
        shape = TableShape.of(steerings)
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
        """Replace all content: one list of edits a request.

        Raises ValueError where two edits of a request meet at one place and position.
        """
        slot_of = {place: index for index, place in enumerate(self.places)}
        row, scale = (
            torch.zeros_like(self.row, device="cpu"),
            torch.zeros_like(self.scale, device="cpu"),
        )
        pattern = torch.full_like(self.pattern, _NO_PATTERN, device="cpu")
        number = 0
        for request, (own, length) in enumerate(zip(steerings, prompt_lengths, strict=True)):
            for steering in own:
                mask = steering.mask(length, self.capacity)
                self.vectors[number] = steering.vector.to(self.vectors)
                self.modes[number] = MODES.index(steering.mode)
                self.masks[number + 1] = mask.to(self.masks.device)
                for place in steering.places(self.config.n_layers):
                    site = slot_of[place]
                    slot = self._free_slot(pattern[site, :, request], mask, place)
                    row[site, slot, request] = number
                    scale[site, slot, request] = steering.scale
                    pattern[site, slot, request] = number + 1
                number += 1
        for own_table, filled in ((self.row, row), (self.scale, scale), (self.pattern, pattern)):
            own_table.copy_(filled)

    def _free_slot(self, patterns: Tensor, mask: Tensor, place: Tap) -> int:
        for slot, taken in enumerate(patterns.tolist()):
            if taken == _NO_PATTERN:
                return slot
            meeting = (self.masks[taken].cpu() & mask).nonzero()
            if meeting.numel():
                raise ValueError(
                    f"two edits meet at layer {place.layer}, {place.point}, position "
                    f"{int(meeting[0])}: add their vectors, or give them different positions"
                )
        raise AssertionError("there are as many slots as edits of a request")

    def at(self, positions: Tensor) -> SiteEdits:
        """The edits of rows at absolute positions [B, T], with nothing read on the host."""
        where = positions.clamp(max=self.capacity - 1)
        batch_at = where[None, None].expand(*self.pattern.shape, -1)  # [Z, S, B, T]
        applies = self.masks[self.pattern[..., None], batch_at]
        # at most one slot applies
        index = torch.where(applies, self.row[..., None], -1).amax(1).flatten(1)  # [Z, B * T]
        scale = torch.where(applies, self.scale[..., None], 0).sum(1).flatten(1)
        return SiteEdits(
            {
                place: Edits(self.vectors, self.modes, index[site], scale[site])
                for site, place in enumerate(self.places)
            }
        )

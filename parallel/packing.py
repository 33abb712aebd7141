"""Fields of rows in one buffer, so that one exchange or one copy moves them all.

A layout names the fields of a row, each one number or a list of numbers per row. Packed rows are
int32 [R, width]: float32 as its bits, int64, which must fit, as int32. Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """Numbers of a row: [R] where length is None, else [R, length]; float32 or int64."""

    name: str
    dtype: torch.dtype
    length: int | None = None

    @property
    def width(self) -> int:
        return 1 if self.length is None else self.length

    def to_int32(self, value: Tensor) -> Tensor:
        """[R] or [R, length] -> [R, width]."""
        assert value.dtype == self.dtype, f"{self.name} is {value.dtype}, not {self.dtype}"
        is_float = self.dtype == torch.float32
        numbers = value.view(torch.int32) if is_float else value.to(torch.int32)
        return numbers[:, None] if self.length is None else numbers

    def from_int32(self, numbers: Tensor) -> Tensor:
        """[..., width] -> [...] or [..., length]; a view of floats."""
        numbers = numbers[..., 0] if self.length is None else numbers
        return numbers.view(torch.float32) if self.dtype == torch.float32 else numbers.long()


@dataclass(frozen=True)
class RowLayout:
    """The fields of a row in their order."""

    fields: tuple[Field, ...]

    @property
    def width(self) -> int:
        """int32 numbers per row."""
        return sum(field.width for field in self.fields)

    def start(self, name: str) -> int:
        """The first column of a field."""
        index = [field.name for field in self.fields].index(name)
        return sum(field.width for field in self.fields[:index])

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The named values of R rows, others left out -> [R, width] int32."""
        return torch.cat([field.to_int32(values[field.name]) for field in self.fields], -1)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The inverse of `pack`, for rows of any shape [..., width]."""
        assert packed.shape[-1] == self.width, f"rows of {packed.shape[-1]}, not {self.width}"
        ends = accumulate(field.width for field in self.fields)
        return {
            field.name: field.from_int32(packed[..., end - field.width : end])
            for field, end in zip(self.fields, ends, strict=True)
        }

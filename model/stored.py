"""The interface of every kind of weights file: tensors by name, read part by part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from ..parallel.spans import Span

# Bounds the memory beside the parameters: a mapped file's pages count as ours until the file is
# closed, so it is closed after every block of this size.
BLOCK_BYTES = 16 * 2**20


class Weights(Protocol):
    """Tensors under the names of transformers. `origin`: the file or folder, for messages."""

    @property
    def origin(self) -> str: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def read(self, name: str, rows: Span, columns: Span | None) -> Iterator[tuple[int, Tensor]]:
        """Yield (row offset within the part, block) over rows and columns of one tensor."""
        ...


def row_blocks(rows: Span, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows start:stop of blocks of a tensor of that shape: at most BLOCK_BYTES each, or one row."""
    row_bytes = 4 * math.prod(shape[1:])
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(rows.start, rows.stop, step):
        yield start, min(rows.stop, start + step)


def interleaved_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where rows of q or k are stored by Meta's code and its heirs.

    They rotate neighbouring numbers of a head, and transformers numbers half a head apart.
    """
    head, within = np.divmod(rows, head_dim)
    half, pair = np.divmod(within, head_dim // 2)
    return np.asarray(head * head_dim + 2 * pair + half)


def named(names: list[str]) -> str:
    """How a message speaks of one or more tensors."""
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"

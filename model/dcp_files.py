"""A torch.distributed.checkpoint folder, as training jobs write: `.metadata` and *.distcp files.

Of every tensor just the rows and columns that are asked for are read, from whichever chunks hold
them: ranks need not talk to each other, nor be as many as those that saved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..parallel.spans import Span
from ..tokenizer.paths import check_regular
from .config import ModelConfig
from .dcp_chunks import BROKEN, Numbers, locate, read_part
from .dcp_metadata import METADATA, Chunk, ChunkedTensor, is_tiled, read_metadata
from .dcp_names import hugging_face_names
from .fields import shown
from .safetensors_files import INDEX, SINGLE, SKIPPED
from .stored import interleaved_rows, row_blocks

_FLOATS = ("float64", "float32", "bfloat16", "float16")
# Of torchtitan's models; the first stores q and k as Meta does.
_TORCHTITAN = ("LlamaForCausalLM", "Qwen3ForCausalLM")


class DistributedCheckpoint:
    """Tensors of a folder; see `Weights`. config: says which rows torchtitan interleaves.

    Raises ValueError naming the file or the tensor that is missing, broken, of a type that is no
    weight, or outside the folder, and for safetensors files beside them.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.origin, self._directory = str(directory), directory
        for other in (INDEX, SINGLE):
            if (directory / other).exists():
                raise ValueError(
                    f"{directory} holds both {METADATA}, a distributed checkpoint, and {other}: "
                    "move one of them away"
                )
        stored = read_metadata(directory / METADATA)
        names, is_torchtitan = hugging_face_names(stored, self.origin)
        if is_torchtitan and config.architecture not in _TORCHTITAN:
            raise ValueError(
                f"{directory} has torchtitan's names of tensors, and its config is of "
                f"{config.architecture}: such names are read for {' and '.join(_TORCHTITAN)}"
            )
        self._is_interleaved = is_torchtitan and config.architecture == _TORCHTITAN[0]
        self._head_dim = config.head_dim
        self._tensors = {
            name: stored[found] for name, found in names.items() if not SKIPPED.search(name)
        }
        self._check()
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._located: dict[Chunk, Numbers] = {}

    def read(self, name: str, rows: Span, columns: Span | None) -> Iterator[tuple[int, Tensor]]:
        """As `Weights.read`."""
        tensor = self._tensors[name]
        is_interleaved = self._is_interleaved and re.search(r"\.[qk]_proj\.", name) is not None
        for start, stop in row_blocks(rows, tensor.shape):
            if is_interleaved:
                stored = interleaved_rows(np.arange(start, stop), self._head_dim)
                first, last = int(stored.min()), int(stored.max())
                around = self._part(name, first, last + 1, columns)
                block = around[torch.from_numpy(stored - first)]
            else:
                block = self._part(name, start, stop, columns)
            yield start - rows.start, block

    def _part(self, name: str, start: int, stop: int, columns: Span | None) -> Tensor:
        """Rows start:stop, and all columns or some, put together from the chunks that meet them."""
        tensor = self._tensors[name]
        bounds = [(start, stop), *((0, size) for size in tensor.shape[1:])]
        if columns is not None:
            bounds[1] = columns.start, columns.stop
        shape = [last - first for first, last in bounds]
        part = torch.empty(shape, dtype=getattr(torch, tensor.dtype))
        origin = [first for first, _ in bounds]
        for chunk in tensor.chunks:
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            lows = [max(pair) for pair in zip(origin, chunk.offsets, strict=True)]
            highs = [min(last, end) for (_, last), end in zip(bounds, ends, strict=True)]
            if all(low < high for low, high in zip(lows, highs, strict=True)):
                numbers, target = self._locate(name, chunk), part[_slices(lows, highs, origin)]
                within = _slices(lows, highs, chunk.offsets)
                read_part(self._directory / chunk.file, numbers, within, target)
        return part

    def _locate(self, name: str, chunk: Chunk) -> Numbers:
        path, dtype = self._directory / chunk.file, getattr(torch, self._tensors[name].dtype)
        if chunk not in self._located:
            try:
                self._located[chunk] = locate(path, chunk, dtype)
            except BROKEN as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{path} does not hold tensor {shown(name)} from byte {chunk.start:,} on, "
                    f"where {METADATA} puts it ({reason}); copy the file again"
                ) from None
        return self._located[chunk]

    def _check(self) -> None:
        """Types and chunks of the tensors, and that files are there and long enough."""
        lengths: dict[str, int] = {}
        for name, tensor in self._tensors.items():
            self._check_tensor(name, tensor)
            for chunk in tensor.chunks:
                path = self._directory / chunk.file
                if chunk.file not in lengths:
                    check_regular(path)
                    if not path.exists():
                        raise ValueError(f"{path} does not exist: copy the checkpoint again")
                    lengths[chunk.file] = path.stat().st_size
                if chunk.start + chunk.length > lengths[chunk.file]:
                    raise ValueError(
                        f"{path} ends before tensor {shown(name)}, which {METADATA} puts there: "
                        "copy the file again"
                    )

    def _check_tensor(self, name: str, tensor: ChunkedTensor) -> None:
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"tensor {shown(name)} of {self.origin} is of type {shown(tensor.dtype)}, which is "
                f"no weight here: only {', '.join(_FLOATS)} are read"
            )
        if not is_tiled(tensor):
            raise ValueError(
                f"the chunks of tensor {shown(name)} of {self.origin} leave gaps, overlap, or lie "
                "outside of it: save it again"
            )


def _slices(
    lows: list[int], highs: list[int], origin: list[int] | tuple[int, ...]
) -> tuple[slice, ...]:
    """Bounds low:high of each dim, counted from `origin`."""
    bounds = zip(lows, highs, origin, strict=True)
    return tuple(slice(low - first, high - first) for low, high, first in bounds)

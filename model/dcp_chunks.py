"""Where the numbers of one chunk of a distributed checkpoint lie, and a part of them.

A chunk is an archive of torch.save within a file. torch reads its head in a mode that allocates
nothing, without code from the file, and says where its numbers begin.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .dcp_metadata import Chunk

# Raised by zipfile, torch and `locate` for bytes that are not the archive of such a tensor.
BROKEN = (
    zipfile.BadZipFile,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    UnpicklingError,
    struct.error,
    ValueError,
)
_OFFSET = "_checkpoint_offset"  # torch.load sets it on the storages that it does not read


class Numbers(NamedTuple):
    """Numbers of a tensor in a file: from byte `start` on, strides in bytes."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def locate(path: Path, chunk: Chunk, dtype: torch.dtype) -> Numbers:
    """Where a chunk's numbers lie. Raises one of BROKEN where there is no such tensor."""
    with path.open("rb") as file:
        view = _FileView(file, chunk.start, chunk.length)
        with zipfile.ZipFile(view) as archive:
            _check_archive(archive)
        view.seek(0)
        with FakeTensorMode():
            file_like = cast(BinaryIO, view)
            tensor = torch.load(file_like, map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a {type(tensor).__name__}")
    if tuple(tensor.shape) != chunk.sizes or tensor.dtype != dtype:
        raise ValueError(f"a {tensor.dtype} of shape {list(tensor.shape)}")
    itemsize, first = dtype.itemsize, getattr(tensor.untyped_storage(), _OFFSET)
    first += tensor.storage_offset() * itemsize
    strides = tuple(stride * itemsize for stride in tensor.stride())
    last = sum((size - 1) * stride for size, stride in zip(chunk.sizes, strides, strict=True))
    if first + last + itemsize > chunk.length:
        raise ValueError("its numbers are cut off")
    return Numbers(chunk.start + first, chunk.sizes, strides, dtype)


def read_part(path: Path, numbers: Numbers, part: tuple[slice, ...], target: Tensor) -> None:
    """Copy some rows and columns into a part of a contiguous tensor, of that shape."""
    # Mapped for this part alone: its pages count as our memory until then. As bytes, because
    # numbers in a file need not be aligned.
    data = np.memmap(path, np.uint8, mode="r")
    shape, strides = (*numbers.shape, numbers.dtype.itemsize), (*numbers.strides, 1)
    held = np.ndarray(shape, np.uint8, buffer=data, offset=numbers.start, strides=strides)
    target.unsqueeze(-1).view(torch.uint8).numpy()[...] = held[part]


def _check_archive(archive: zipfile.ZipFile) -> None:
    """Numbers are read as they stand in the file: not compressed, and of this machine's order."""
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        if entry.filename.endswith("/byteorder"):
            with archive.open(entry) as file:
                if file.read(1) != sys.byteorder[:1].encode():
                    raise ValueError("its bytes are in the order of another machine")


class _FileView(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._start + self._position)
        data = self._file.read(max(0, min(len(buffer), self._length - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

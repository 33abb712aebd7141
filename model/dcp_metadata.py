"""The `.metadata` file of a torch.distributed.checkpoint folder, read as data.

torch writes it as a pickle, and a pickle may name any function for its reader to call. Here it may
name the few classes that torch writes, and nothing else. They are stood in for by records that do
nothing but hold what they are given, made afresh for each file: no file can call or change code.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..tokenizer.paths import check_regular
from .fields import shown

METADATA = ".metadata"
# Enough for 405 billion weights with their optimizer on 200 ranks; at most 72 bytes come of one.
LARGEST_METADATA_BYTES = 256 * 2**20
_CHECKPOINT = "torch.distributed.checkpoint"
_CLASSES = {
    f"{_CHECKPOINT}.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex "
    "StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    f"{_CHECKPOINT}.filesystem": "_StorageInfo",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "pathlib": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
    "collections": "OrderedDict",
}
# Raised by pickle, and by the reading of what it gives, for a file that is no such metadata.
_BROKEN = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, from `offsets` on, that fills bytes start:start+length of a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor stored in chunks. dtype: its name in torch."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(path: Path) -> dict[str, ChunkedTensor]:
    """The tensors of a checkpoint by name; whatever else is saved with them is left out.

    Raises ValueError naming the file that is missing, too large or no such metadata, the function
    that it would have had called.
    """
    check_regular(path)
    try:
        if path.stat().st_size > LARGEST_METADATA_BYTES:
            raise ValueError(f"larger than {LARGEST_METADATA_BYTES >> 20} MiB")
        # of bytes in memory, so that no more is set aside than there is
        tensors = dict(_tensors(_Unpickler(io.BytesIO(path.read_bytes())).load()))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: the checkpoint was not saved whole") from None
    except (OSError, *_BROKEN) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path} is no metadata of a torch.distributed.checkpoint ({reason}); save it again"
        ) from None
    return tensors


def is_tiled(tensor: ChunkedTensor) -> bool:
    """Whether chunks tile a tensor: bands of rows, each split over its columns.

    Chunks of a mesh are laid in such a way. A tensor of more dims must lie in bands alone.
    """
    shape = tensor.shape
    if not shape:
        return len(tensor.chunks) == 1
    if any(len(chunk.sizes) != len(shape) for chunk in tensor.chunks):
        return False
    bands: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in tensor.chunks:
        bands.setdefault((chunk.offsets[0], chunk.sizes[0]), []).append(chunk)
    within = all(
        _follow_each_other([(chunk.offsets[1], chunk.sizes[1]) for chunk in band], shape[1])
        if len(shape) > 1
        else len(band) == 1
        for band in bands.values()
    )
    deeper = all(chunk.sizes[2:] == shape[2:] for chunk in tensor.chunks)
    return within and deeper and (_follow_each_other(list(bands), shape[0]) or not math.prod(shape))


def _follow_each_other(parts: list[tuple[int, int]], full: int) -> bool:
    """Whether parts (offset, size) cover 0:full without gap or overlap."""
    stop = 0
    for offset, size in sorted(parts):
        if offset != stop:
            return False
        stop += size
    return stop == full


class _Record:
    """A stand-in for a class of torch. state: the arguments, or what it is restored from."""

    state: Any

    def __new__(cls, *arguments: Any) -> _Record:
        made = super().__new__(cls)
        made.state = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """The reader in Python, which keeps a table by number; that in C makes room for any number."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._records = {
            (module, name): type(name, (_Record,), {})
            for module, names in _CLASSES.items()
            for name in names.split()
        }

    def find_class(self, module: str, name: str) -> Any:
        """A record, or the name of a dtype. Raises UnpicklingError for anything else."""
        if (module, name) in self._records:
            return self._records[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        raise pickle.UnpicklingError(
            f"it names {shown(f'{module}.{name}')}, which is no part of one"
        )


def _tensors(metadata: Any) -> Iterator[tuple[str, ChunkedTensor]]:
    fields = _fields(metadata, "Metadata")
    where: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
    for index, info in fields["storage_data"].items():
        key = _fields(index, "MetadataIndex")
        if key.get("offset") is not None:
            where[key["fqn"], _numbers(key["offset"])] = _fields(info, "_StorageInfo")
    for name, held in fields["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise TypeError(f"a tensor's name is {shown(name)}")
        if type(held).__name__ == "BytesStorageMetadata":
            continue
        tensor = _fields(held, "TensorStorageMetadata")
        chunks = []
        for record in tensor["chunks"]:
            chunk = _fields(record, "ChunkStorageMetadata")
            offsets, sizes = _numbers(chunk["offsets"]), _numbers(chunk["sizes"])
            if 0 not in sizes:
                chunks.append(Chunk(offsets, sizes, *_part_of_file(name, where[name, offsets])))
        dtype = _state(tensor["properties"], "TensorProperties")[0]
        yield name, ChunkedTensor(str(dtype), _numbers(tensor["size"]), tuple(chunks))


def _part_of_file(name: str, info: Mapping[str, Any]) -> tuple[str, int, int]:
    file, (start, length) = info["relative_path"], _whole((info["offset"], info["length"]))
    if not isinstance(file, str) or file != Path(file).name or "\\" in file or file in ("", ".."):
        raise ValueError(f"tensor {shown(name)} is in {shown(file)}, which is not beside it")
    if info.get("transform_descriptors"):
        raise ValueError(f"tensor {shown(name)} is compressed or otherwise transformed")
    return file, start, length


def _state(record: Any, name: str) -> Any:
    if not isinstance(record, _Record) or type(record).__name__ != name:
        raise TypeError(f"a {type(record).__name__} stands for a {name}")
    return record.state


def _fields(record: Any, name: str) -> Mapping[str, Any]:
    fields = _state(record, name)
    if not isinstance(fields, dict):
        raise TypeError(f"a {name} has no fields")
    return fields


def _numbers(size: Any) -> tuple[int, ...]:
    """The numbers of a torch.Size."""
    (numbers,) = _state(size, "Size")
    return _whole(numbers)


def _whole(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or len(numbers) > 8:
        raise TypeError(f"sizes are {shown(numbers)}")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise ValueError(f"sizes are {shown(numbers)}")
    return numbers

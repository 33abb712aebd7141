"""The header of a .gguf file: walked through before the `gguf` library believes what it says.

That library makes objects of some 700 bytes for each entry of an array, and counts on as far as a
length says, past the end of the file. Here every count and length is compared with what is left.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from .fields import shown

if TYPE_CHECKING:
    from gguf import GGUFReader

MOST_KEYS = MOST_TENSORS = 100_000
MOST_DIMS = 4
MOST_NUMBERS = 2**53  # of one tensor
MOST_NAME_BYTES = 2**16
MOST_TEXT_BYTES = 2**26
MOST_VALUES = 1_500_000  # of all arrays, a text counting twice; Llama 3.1 has 945,000
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
# gguf's reader raises these for numbers that mean nothing.
GGUF_BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError)


def gguf_reader(path: Path) -> GGUFReader:
    """The library's reader of a file whose header is within bounds.

    Raises ValueError with the reason alone for a broken file, OSError for one that cannot be read.
    """
    from gguf import GGUFReader

    check_gguf_header(path)
    try:
        return GGUFReader(path)
    except GGUF_BROKEN as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def check_gguf_header(path: Path) -> None:
    """Raise ValueError with the reason for a header that is cut short, broken or out of bounds."""
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()


class _Header:
    """A place in the file's bytes, moved on by what is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = self._n_values = 0
        self._order = "<"

    def check(self) -> None:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if self._whole("H") == 0:  # the version, in the other order of bytes
            self._order = ">"
        self._at = 8
        n_tensors = self._count("Q", MOST_TENSORS, "tensors")
        n_keys = self._count("Q", MOST_KEYS, "keys")
        for _ in range(n_keys):
            self._key()
        for _ in range(n_tensors):
            self._tensor()

    def _key(self) -> None:
        name = self._name()
        kind = self._whole("I")
        if kind == _ARRAY:
            kind = self._whole("I")
            n = self._count("Q", MOST_VALUES, f"values of {name}")
            self._n_values += n * (2 if kind == _TEXT else 1)
            if self._n_values > MOST_VALUES:
                raise ValueError(f"its arrays hold more than {MOST_VALUES:,} values")
        else:
            n = 1
        if kind == _TEXT:
            for _ in range(n):
                self._bytes(self._count("Q", MOST_TEXT_BYTES, f"bytes of a text of {name}"))
        elif kind in _SCALAR_BYTES:
            self._bytes(n * _SCALAR_BYTES[kind])
        else:
            raise ValueError(f"key {name} is of kind {kind}, which is not read")

    def _tensor(self) -> None:
        name = self._name()
        shape = [self._whole("Q") for _ in range(self._count("I", MOST_DIMS, f"dims of {name}"))]
        if math.prod(shape) > MOST_NUMBERS or 0 in shape:
            raise ValueError(f"tensor {name} is of shape {shown(shape[::-1])}")
        self._bytes(4 + 8)  # its type and its place, which the library compares with the file

    def _name(self) -> str:
        raw = self._bytes(self._count("Q", MOST_NAME_BYTES, "bytes of a name"))
        return shown(raw.decode("utf-8", "replace"))

    def _count(self, width: str, most: int, what: str) -> int:
        count = self._whole(width)
        if count > most:
            raise ValueError(f"it says that there are {count:,} {what}: at most {most:,} are read")
        return count

    def _whole(self, width: str) -> int:
        layout = self._order + width
        (value,) = struct.unpack(layout, self._bytes(struct.calcsize(layout)))
        return int(value)

    def _bytes(self, n: int) -> bytes:
        found = self._data[self._at : self._at + n]
        if len(found) < n:
            raise ValueError("it ends before its header does")
        self._at += n
        return found

"""A hash of values that is the same in every process, unlike Python's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

DIGEST_BYTES = 8


class Digest:
    """The digest of what a rank is asked for."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def add(self, *values: Any) -> None:
        """Add numbers, texts, tensors, and sequences, sets and mappings of them.

        Each is written with its kind and length, so that no two lists of values look alike. A
        tensor counts with its dtype, shape and bytes. Numbers that are equal are alike.
        """
        for value in values:
            if isinstance(value, Tensor):
                self._write("tensor", f"{value.dtype} {list(value.shape)}".encode())
                raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                self._write("bytes", raw.numpy().tobytes())
            elif isinstance(value, Mapping):
                self.add(sorted(value.items()))
            elif isinstance(value, Set):
                self.add(sorted(value))
            elif isinstance(value, Sequence) and not isinstance(value, str):
                self._write("sequence", str(len(value)).encode())
                self.add(*value)
            elif isinstance(value, bool | int | float):
                is_whole = value == value // 1  # 1, 1.0 and True are one number
                self._write("number", repr(int(value) if is_whole else float(value)).encode())
            else:
                self._write(type(value).__name__, str(value).encode(errors="surrogatepass"))

    def _write(self, kind: str, content: bytes) -> None:
        self._hash.update(f"{kind} {len(content)} ".encode() + content)

    def digest(self) -> bytes:
        return self._hash.digest()

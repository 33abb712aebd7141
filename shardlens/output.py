"""Standard output of a command: it may fill a disk, and its reader may leave before the end."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from .engine.files import WriteError


class _Outlet:
    """A stream that can be written to after it has failed: the first error is kept."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            action()
        except OSError as error:
            self.error = error
            self._discard()

    def _discard(self) -> None:
        """Lead the stream nowhere: what it holds back would fail once more when Python ends."""
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Work and output files of the block do not depend on who reads standard output.

    Where it cannot be written, such as on a full disk, WriteError is raised once all is done. A
    reader that has closed its pipe has seen enough: this is no error.
    """
    _open_standard_streams()
    stream = sys.stdout
    if stream is None:  # it was closed
        yield
        return
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    outlet = _Outlet(stream)
    sys.stdout = cast(TextIO, outlet)
    try:
        yield
    except SystemExit:
        outlet.flush()
        _raise_if_failed(outlet)
        raise
    else:
        outlet.flush()
        _raise_if_failed(outlet)
    finally:
        outlet.flush()
        sys.stdout = stream


def _open_standard_streams() -> None:
    """Lead those that are closed nowhere: a file would get their number, and what is said there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _raise_if_failed(outlet: _Outlet) -> None:
    error = outlet.error
    if error is not None and not isinstance(error, BrokenPipeError | ConnectionResetError):
        what = error.strerror or str(error)
        raise WriteError(f"standard output cannot be written: {what}") from None

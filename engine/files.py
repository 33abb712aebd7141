"""Output files: whole or not there at all, and what stands at their path respected."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any

# Content for a device or a fifo waits in memory up to this size, and in a temporary file beyond it.
BUFFER_BYTES = 64 * 2**20


class WriteError(OSError):
    """A failure to write, such as a full disk, in one line that names the file."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file to write bytes to; what stands at `path` changes only if the block succeeds.

    A regular file is replaced by one of the same mode, and a link stays: the file that it leads to
    is replaced. A device, a fifo and the standard output of this process are written to as they
    are. Raises ValueError where `check_writable` does, WriteError if writing fails.
    """
    check_writable(path)
    target = _regular_target(path)
    opened = _passing_on(path) if target is None else _replacement(target)
    try:
        with opened as file:
            yield file
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Raise ValueError if nothing could be written to `path`; cheap, to ask before long work."""
    try:
        reason = _obstacle(path)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        raise ValueError(f"{path} cannot be written: {reason}")


def check_outputs(paths: Iterable[Path]) -> None:
    """Raise ValueError if not all of these could be written, or if one would replace another."""
    seen: dict[Path, Path] = {}
    for path in paths:
        check_writable(path)
        target = _regular_target(path)
        if target in seen:
            raise ValueError(f"{path} is to be written twice: give {seen[target]} another name")
        if target is not None:
            seen[target] = path


def _obstacle(path: Path) -> str | None:
    found = _stat(path)
    if found is not None and stat.S_ISDIR(found.st_mode):
        return "it is a folder"
    target = _regular_target(path)
    if found is not None:
        # A file that nobody may write to is kept even from root, whom the system would let.
        is_locked = target is not None and not found.st_mode & 0o222
        if _standard_stream(path) is None and (is_locked or not os.access(path, os.W_OK)):
            return "it is read-only"
    if target is None:
        return None
    if not target.parent.is_dir():
        return f"there is no folder {target.parent}"
    if not os.access(target.parent, os.W_OK | os.X_OK):
        return f"its folder {target.parent} is read-only"
    descriptor, partial = _new_partial(target.parent, 0o600)
    os.close(descriptor)
    partial.unlink()
    return None


def _stat(path: Path) -> os.stat_result | None:
    """Facts of what stands at a path, links followed; None where nothing does."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _regular_target(path: Path) -> Path | None:
    """The regular file, there or yet to be made, that a path leads to; None for anything else."""
    found, target = _stat(path), Path(os.path.realpath(path))
    if found is None:
        return target
    if not stat.S_ISREG(found.st_mode) or _standard_stream(path) is not None:
        return None
    # A link of /proc may lead to a file that has no name any more.
    named = _stat(target)
    return target if named is not None and os.path.samestat(found, named) else None


def _standard_stream(path: Path) -> int | None:
    """The number of the output stream of this process that a path is, such as /dev/stdout."""
    found = _stat(path)
    for descriptor in (1, 2):
        with suppress(OSError):
            if found is not None and os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _new_partial(folder: Path, mode: int) -> tuple[int, Path]:
    """An empty file that nobody could have put there before, open for writing; and its path."""
    partial = folder / f".shardlens-{secrets.token_hex(8)}.partial"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(partial, flags, mode), partial


@contextmanager
def _replacement(target: Path) -> Iterator[IO[bytes]]:
    """A file beside `target` that takes its place, its mode and, where allowed, its owner."""
    before = _stat(target)
    descriptor, partial = _new_partial(target.parent, 0o666 if before is None else 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if before is not None:
                with suppress(PermissionError):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, before.st_mode & 0o777)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _passing_on(path: Path) -> Iterator[IO[bytes]]:
    """A buffer that is written, once it is complete, to a device, a fifo or a standard stream."""
    with SpooledTemporaryFile(max_size=BUFFER_BYTES) as buffer:
        yield buffer
        buffer.seek(0)
        number = _standard_stream(path)
        if number is None:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        else:
            # Opened anew, a file behind the stream would be written from its start.
            descriptor = os.dup(number)
            (sys.stdout if number == 1 else sys.stderr).flush()
        try:
            with os.fdopen(descriptor, "wb") as out:
                shutil.copyfileobj(buffer, out)
        except BrokenPipeError:
            if number is None:
                raise  # of a standard stream, the reader has seen enough


def require(module: str, extra: str, what: str) -> None:
    """Raise ValueError if `module`, which comes with an extra, is not installed."""
    try:
        import_module(module)
    except ImportError:
        raise ValueError(f"{what} needs {module}: pip install 'shardlens[{extra}]'") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON, laid out as `json_text` does. Raises as `replacing` does."""
    # JSON has an escape for halves of characters, UTF-8 has no bytes for them.
    text = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", json_text(content))
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


def json_text(value: Any, indent: str = "") -> str:
    """JSON with a line per entry, but arrays of plain values on one line.

    Raises ValueError for NaN and infinity, which JSON has no number for.
    """
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{_plain(str(name))}: {json_text(part, inner)}" for name, part in value.items()]
        return _block("{}", lines, indent)
    if isinstance(value, list | tuple) and any(isinstance(x, dict | list | tuple) for x in value):
        return _block("[]", [json_text(part, inner) for part in value], indent)
    return _plain(value)


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _block(brackets: str, lines: list[str], indent: str) -> str:
    body = ",".join(f"\n{indent} {line}" for line in lines)
    return f"{brackets[0]}{body}\n{indent}{brackets[1]}"

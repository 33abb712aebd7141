"""Output files that are whole or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; the file replaces it only if the block succeeds.

    Raises ValueError where the folder cannot be written to.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise ValueError if a file could not be put at `path`; cheap, to ask before long work."""
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {folder}")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written")


def require(module: str, extra: str, what: str) -> None:
    """Raise ValueError if `module`, which comes with an extra, is not installed."""
    try:
        import_module(module)
    except ImportError:
        raise ValueError(f"{what} needs {module}: pip install 'shardlens[{extra}]'") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON, laid out as `json_text` does."""
    with replacing(path) as partial:
        partial.write_text(json_text(content) + "\n", encoding="utf-8")


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

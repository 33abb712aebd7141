"""A JSON object from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .paths import check_regular, read_text

# An empty list is 3 bytes in a file and 64 in memory.
MOST_LISTS = 6_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises ValueError naming a file that is missing, no regular file, too large, or broken.
    """
    check_regular(path)
    return read_object(path, "the model's own file")


def read_object(path: Path, what: str, most_bytes: int | None = None) -> dict[str, Any]:
    """The object that a file holds, as `read_text` reads it. Raises ValueError naming the file."""
    text = read_text(path, what, most_bytes)
    if text.count("[") + text.count("{") > MOST_LISTS:
        raise ValueError(f"{path} holds more than {MOST_LISTS:,} lists; give {what}")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: nested too deep to be read as JSON") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: cannot be read as JSON, broken json ({error}); give {what}"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: does not hold a JSON object")
    return content

"""A JSON object from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_regular(path: Path) -> None:
    """Raise ValueError for a folder, a device or a fifo, for which a reader would wait."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; put the model's own file there")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises ValueError naming a file that is missing, no regular file, or broken.
    """
    check_regular(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        content = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: nested too deep to be read as JSON") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: cannot be read as JSON, broken json ({error}); fetch the file again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: does not hold a JSON object")
    return content

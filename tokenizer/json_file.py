"""A JSON object from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds. Raises ValueError naming a file that is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: cannot be read as JSON, broken json ({error}); fetch the file again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: does not hold a JSON object")
    return content

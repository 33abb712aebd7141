"""Paths that users and published files give, checked before anything is opened."""

from __future__ import annotations

import os
from pathlib import Path

# So that what is parsed stays below 2 GiB whatever it is: in JSON a 3-byte list takes 64 bytes.
LARGEST_BYTES = 64 * 2**20


def user_path(given: str | Path) -> Path:
    """The path that a user gives; `~` stands for a home folder.

    Raises ValueError for one that the system does not look at: a name too long, a folder closed to
    this user, a user without a home.
    """
    try:
        path = Path(given).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(given)[:200]} leads nowhere: {error}") from None
    _look_at(path)
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise ValueError(f"{path} is a folder closed to this user; change its mode")
    return path


def check_regular(path: Path) -> None:
    """Raise ValueError for a folder, a device or a fifo, for which a reader would wait.

    A path that the system does not look at is refused, too; one where nothing stands is not.
    """
    _look_at(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; put the model's own file there")


def read_text(path: Path, what: str, most_bytes: int | None = None) -> str:
    """The text of a file in UTF-8; see `read_bytes`.

    A mark that some editors put first is left out. Raises ValueError for a file that is not UTF-8,
    too.
    """
    try:
        return read_bytes(path, what, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start:,}; save it in UTF-8") from None


def read_bytes(path: Path, what: str, most_bytes: int | None = None) -> bytes:
    """The content of a file of at most `most_bytes`, by default LARGEST_BYTES.

    what: the words for such a file in an error. Raises ValueError naming a file that is missing,
    too large, or not to be read.
    """
    most = LARGEST_BYTES if most_bytes is None else most_bytes
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give {what}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)[:200]} cannot be read: {reason}") from None
    if len(data) > most:
        raise ValueError(
            f"{path} is larger than {most >> 20} MiB, the most that is read of {what}; split it"
        )
    return data


def _look_at(path: Path) -> None:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)[:200]} cannot be looked at: {reason}") from None

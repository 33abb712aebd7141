"""The result file of a stage: whole at every moment, whatever ends the stage."""

from __future__ import annotations

import json
import math
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..engine.files import write_json

# Words of a device's name that do not tell one card from another: makers, and kinds of memory.
DROPPED_WORDS = r"nvidia|geforce|tesla|generation|\d+gb|hbm\d*\w?|sxm\d*"
REHEARSAL = "cpu-rehearsal"  # decides nothing


def card(device_name: str | None) -> str:
    """A name for files, such as h100 or rtx-4090; without a device, that of a rehearsal."""
    if device_name is None:
        return REHEARSAL
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    return "-".join(w for w in words if not re.fullmatch(DROPPED_WORDS, w)) or "gpu"


class Journal:
    """Results so far. `finished` is false till the end, and `in_progress` says what was begun."""

    def __init__(self, path: Path, **head: Any) -> None:
        self.path = path
        self._started = time.monotonic()
        self.content: dict[str, Any] = {
            **head,
            "finished": False,
            "in_progress": None,
            "failed": {},
            "red": {},
        }
        self.write()

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self._started, 1)
        write_json(self.path, _finite(self.content))

    def record(self, **results: Any) -> None:
        self.content |= results
        self.write()

    def now(self, what: str) -> None:
        """Say what comes next."""
        self.record(in_progress=what)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """What fails in the block is recorded, and those after it go on."""
        outer = self.content["in_progress"]
        self.now(name)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            doing = self.content["in_progress"]
            self.content["failed"][doing] = first_line(error)
            print(f"FAILED {doing}: {first_line(error)}", file=sys.stderr, flush=True)
        self.record(in_progress=outer)

    def add_red(self, what: str, *found: str) -> None:
        """A test or check that failed; what it tests is not reported."""
        self.content["red"].setdefault(what, []).extend(found)
        for text in found:
            print(f"RED {what}: {text}", flush=True)
        self.write()

    def finish(self) -> int:
        """An exit code: 1 if something failed or is red."""
        self.record(finished=True)
        return int(bool(self.content["failed"] or self.content["red"]))


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def is_finished(path: Path) -> bool:
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


def mark_end(path: Path, how: str) -> None:
    """Say in the file of a stage that did not finish how it ended."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {"finished": False} | content | {"ended": how})


def _finite(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

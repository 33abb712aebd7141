"""The best tap of a report, read back from its JSON."""

from __future__ import annotations

from pathlib import Path

from ..model.points import POINTS, Tap
from ..tokenizer.json_file import read_object
from ..tokenizer.paths import user_path

REPORT = "a report that `steer eval --json` wrote"


def read_best(path: str | Path) -> Tap:
    """The tap with the largest mean slope. Raises ValueError naming a file that is no report."""
    path = user_path(path)
    best = read_object(path, REPORT).get("best")
    fields = best if isinstance(best, dict) else {}
    layer, point = fields.get("layer"), fields.get("point")
    if type(layer) is not int or layer < 0 or point not in POINTS:
        raise ValueError(f"{path} names no best layer: give {REPORT}")
    return Tap(layer, point)

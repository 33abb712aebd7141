"""Sizes of the texts that a template's formats would give, before they are made."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import SecurityError

from .template_budget import MOST_SIZE, Budget

_SPEC = re.compile(r"%(?:\([^()]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")


def percent_size(budget: Budget, left: str | bytes, right: Any) -> int:
    """Characters of `left % right` at most, a value's repr counted as its size."""
    text = left if isinstance(left, str) else left.decode("latin-1")
    values = right if isinstance(right, tuple) else (right,)
    stars = max((abs(value) for value in values if isinstance(value, int)), default=0)
    size, n_specs = len(text), 0
    for spec in _SPEC.finditer(text):
        n_specs += 1
        size += sum(stars if part == "*" else int(part) for part in spec.groups() if part)
        if size > MOST_SIZE:
            return size
    repeats = n_specs if isinstance(right, Mapping) else 1
    return size + repeats * budget.size(right)


def format_size(budget: Budget, text: str, given: list[Any]) -> int:
    """Characters of `text.format(*given)` at most, a value's repr counted as its size."""
    size, largest = len(text), max(map(budget.size, given), default=0)
    for _, name, spec, _ in string.Formatter().parse(text):
        if "{" in (spec or ""):
            raise SecurityError("it takes the width of a format from a value")
        size += sum(map(int, re.findall(r"\d+", spec or "")))
        size += 0 if name is None else largest
        if size > MOST_SIZE:
            break
    return size

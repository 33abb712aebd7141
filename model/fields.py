"""Typed and bounded reading of a JSON object whose every key must be known.

A checkpoint's files come from strangers: a value of another type, out of bounds or not finite is
refused here by name, before any loop or allocation depends on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Default = TypeVar("Default")
_REQUIRED: Any = object()


class Fields:
    """The fields of a JSON object; null counts as absent. source: what messages call the object.

    Readers raise ValueError naming the field, its value and what is taken. A default is returned
    for an absent field; without one the field must be there.
    """

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self._raw, self.source = raw, source

    def __contains__(self, name: str) -> bool:
        return self._raw.get(name) is not None

    def names(self) -> list[str]:
        """The keys that are not null."""
        return [str(name) for name in self._raw if name in self]

    def has_null(self, name: str) -> bool:
        """Whether the field is there and null."""
        return name in self._raw and self._raw[name] is None

    def value(self, name: str, default: Any = None) -> Any:
        """The field as it is."""
        return self._raw[name] if name in self else default

    def integer(self, name: str, low: int, high: int, default: int | None = _REQUIRED) -> Any:
        """A whole number from low to high; true and false are none, nor is 1.0."""
        value = self._required(name, default)
        if name not in self:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"not a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = _REQUIRED) -> Any:
        """A finite number from low to high, as float."""
        value = self._required(name, default)
        if name not in self:
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # compared before anything is converted: a whole number may be too large for a float
        if not is_number or not low <= value <= high:
            raise self.error(name, f"not a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "neither true nor false")
        return value

    def choice(self, name: str, choices: Iterable[str], default: str) -> str:
        """One of some texts."""
        value, known = self.value(name, default), list(choices)
        if not isinstance(value, str) or value not in known:
            raise self.error(name, f"not supported: only {', '.join(known)}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty for an absent field."""
        value = self.value(name, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(name, "not a list of texts")
        return value

    def object(self, name: str) -> Fields | None:
        """A JSON object; None for an absent field or one without keys."""
        value = self.value(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, "not a JSON object")
        return Fields(value, f"{self.source}: {name}") if value else None

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Raise ValueError for a key, other than a null one, that is not among the known."""
        for name in sorted(self._raw.keys() - set(known), key=str):
            if name in self:
                raise ValueError(
                    f"{self.source}: key {shown(name)} with value {shown(self._raw[name])} is not "
                    "known, and may change the model's numbers; delete it if it does not"
                )

    def error(self, name: str, complaint: str) -> ValueError:
        """An error about a field."""
        return ValueError(f"{self.source}: {name} is {shown(self._raw.get(name))}, {complaint}")

    def _required(self, name: str, default: Any) -> Any:
        if name in self:
            return self._raw[name]
        if default is _REQUIRED:
            raise ValueError(f"{self.source} lacks {name}")
        return default


def shown(value: Any) -> str:
    """A stranger's value for a message: on one line, in ASCII, and short."""
    try:
        text = " ".join(ascii(_head(value)).split())
    except (ValueError, RecursionError):  # a whole number of thousands of digits; nesting
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _head(value: Any, depth: int = 80) -> Any:
    """The part of a value that 80 characters can show, of one that may hold millions."""
    if isinstance(value, str):
        return value[:100]
    if isinstance(value, list) and depth:
        return [_head(item, depth - 1) for item in value[:40]]
    if isinstance(value, dict) and depth:
        items = itertools.islice(value.items(), 40)
        return {_head(name): _head(item, depth - 1) for name, item in items}
    return [] if isinstance(value, list | dict) else value

"""Objects on one line, for a prompt or a log, however large a text, a list or a tensor is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

MOST_CHARACTERS = 159
TEXT_CHARACTERS = 48
SHOWN_ITEMS = 4  # of a longer list, the first ones


def one_line(item: Any) -> str:
    """`Name(field=value, …)` of a dataclass, to be its `__repr__`; without fields at defaults."""
    parts = [
        f"{field.name}={brief(getattr(item, field.name))}"
        for field in dataclasses.fields(item)
        if field.repr and not _is_default(field, getattr(item, field.name))
    ]
    return named(item, *parts)


def named(item: Any, *parts: str) -> str:
    """`Name(part, …)`, cut where a line is full."""
    text = f"{type(item).__name__}({', '.join(parts)})"
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 2]}…)"


def brief(value: Any) -> str:
    """A value's kind and size where it is large, else its repr; hidden characters are escaped."""
    shape = getattr(value, "shape", None)
    if shape is not None and getattr(value, "ndim", 0) > 0:
        return f"{list(shape)} {value.dtype}".replace("torch.", "")
    if isinstance(value, str):
        is_short = len(value) <= TEXT_CHARACTERS
        return repr(value) if is_short else repr(value[: TEXT_CHARACTERS - 1] + "…")
    if isinstance(value, Mapping):
        items = [f"{brief(name)}: {brief(part)}" for name, part in _first(value.items())]
        return _listed("{}", items, len(value))
    if isinstance(value, Set):
        return _listed("{}", list(map(brief, _first(sorted(value, key=repr)))), len(value))
    if isinstance(value, Sequence) and not isinstance(value, bytes) and not _has_repr(value):
        return _listed("[]", list(map(brief, _first(value))), len(value))
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def counted(number: int, noun: str) -> str:
    """The number with its noun, as in "1 item" and "1,024 items"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _first(values: Any) -> list[Any]:
    return [value for value, _ in zip(values, range(SHOWN_ITEMS), strict=False)]


def _listed(brackets: str, shown: list[str], n_items: int) -> str:
    rest = [f"… {n_items:,} in all"] if n_items > len(shown) else []
    return f"{brackets[0]}{', '.join([*shown, *rest])}{brackets[1]}"


def _has_repr(value: Sequence[Any]) -> bool:
    """Whether a sequence names its fields, as a Tap does."""
    return hasattr(value, "_fields")


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        default = field.default
    return type(value) is type(default) and bool(value == default)

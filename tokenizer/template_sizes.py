"""Sizes of results that operators, methods and filters of a template would have, before they are.

Only those are here whose result can be much larger than all that they are given, or that take
longer than in proportion to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import SecurityError

from .template_budget import ITEM, MOST_BITS, Budget
from .template_formats import format_size, percent_size

MOST_PRODUCT = 10**9  # of two lengths, where an operation takes so many steps
MOST_SLOW = 10_000  # characters for what takes time by the square of its text
MOST_COUNT = 100_000  # of parts that a filter is asked for
_PADDED = ("center", "ljust", "rjust", "zfill", "to_bytes")
_BACKWARDS = ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "translate")
_SLOW = ("wordwrap", "urlize", "pprint", "striptags", "xmlattr")
_CODECS = ("utf-8", "utf8", "ascii", "latin-1")

Texts = (str, bytes)


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large."""
    if operator == "%" and isinstance(left, Texts):
        budget.check(percent_size(budget, left, right))
    elif operator == "+" and isinstance(left, (*Texts, list, tuple)):
        budget.check(budget.size(left) + budget.size(right))
    elif isinstance(left, int) and isinstance(right, int):
        _check_numbers(operator, left, right)
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (*Texts, list, tuple)) and isinstance(count, int):
                inner = budget.size(sequence) - ITEM
                budget.check(inner * max(0, count))


def check_method(
    budget: Budget, value: str | bytes | int, name: str, args: list[Any], named: Mapping[str, Any]
) -> None:
    """Refuse a call of a method of text or numbers that would be too large or too slow.

    A generator in args is replaced by its list.
    """
    if isinstance(value, int):
        length = 0
        budget.check(max(_numbers(args, named), default=0))
    else:
        length = len(value)
    given = [*args, *named.values()]
    if name in _PADDED:
        budget.check(max(_numbers(args, named), default=0))
    elif name == "expandtabs" and isinstance(value, Texts):
        tab = "\t" if isinstance(value, str) else b"\t"
        tabs = value.count(tab)  # type: ignore[arg-type]
        budget.check(length + tabs * max(_numbers(args, named), default=8))
    elif name == "replace" and isinstance(value, Texts):
        check_replace(budget, value, **_by_name(("old", "new"), args, named))
    elif name == "join":
        if named:
            raise SecurityError("it names the argument of join")
        args[:1] = [budget.listed(parts) for parts in args[:1]]
        budget.check(sum(_joined_size(budget, parts, length) for parts in args[:1]))
    elif name in ("format", "format_map") and isinstance(value, str):
        budget.check(format_size(budget, value, given))
    elif name in ("encode", "decode"):
        codec = _by_name(("encoding",), args, named).get("encoding", "utf-8")
        if codec not in _CODECS:
            raise SecurityError(f"it may {name} text with {', '.join(_CODECS)} only")
    elif name in _BACKWARDS:
        check_product(length, sum(budget.size(part) for part in given))


def check_filter(budget: Budget, name: str, args: list[Any], named: Mapping[str, Any]) -> None:
    """Refuse a filter whose result would be too large or too slow to make.

    A generator in args that is to be joined is replaced by its list.
    """
    text = str(args[0]) if args and name in ("center", "indent", "replace", "trim") else ""
    given = [*args[1:], *named.values()]
    if name == "center":
        budget.check(max(_numbers(given, {}), default=0))
    elif name == "indent":
        width = _by_name(("width",), args[1:], named).get("width", 4)
        step = width if isinstance(width, int) else len(str(width))
        budget.check(len(text) + (text.count("\n") + 1) * max(0, step))
    elif name == "replace":
        asked = _by_name(("old", "new"), args[1:], named)
        check_replace(budget, text, **{name: str(value) for name, value in asked.items()})
    elif name == "trim":
        check_product(len(text), sum(budget.size(part) for part in given))
    elif name == "format" and args:
        right = named if named else tuple(args[1:])
        budget.check(percent_size(budget, str(args[0]), right))
    elif name == "join" and args:
        args[0] = budget.listed(args[0])
        separator = args[1] if len(args) > 1 else named.get("d", "")
        budget.check(_joined_size(budget, args[0], len(str(separator))))
    elif name in ("batch", "slice"):
        if max(map(abs, _numbers(given, {})), default=0) > MOST_COUNT:
            raise SecurityError(f"it asks {name} for more than {MOST_COUNT:,}")
    elif name == "round":
        if max(map(abs, _numbers(given, {})), default=0) > 1000:
            raise SecurityError("it rounds to more than 1,000 digits")
    elif name in _SLOW and budget.size([args, dict(named)]) > MOST_SLOW:
        raise SecurityError(f"it gives {name} more than {MOST_SLOW:,} characters")


def check_replace(budget: Budget, text: Any, old: Any = "", new: Any = "") -> None:
    """Refuse a replacement that makes a text too long."""
    is_alike = isinstance(text, str) == isinstance(old, str) == isinstance(new, str)
    if is_alike and all(isinstance(value, Texts) for value in (text, old, new)):
        budget.check(len(text) + text.count(old) * max(0, len(new) - len(old)))


def check_product(first: int, second: int) -> None:
    """Refuse an operation that compares each part of one value with each of another."""
    if first * second > MOST_PRODUCT:
        raise SecurityError("it compares texts that are too long")


def _check_numbers(operator: str, left: int, right: int) -> None:
    bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(0, right)}
    if bits.get(operator, 0) > MOST_BITS:
        raise SecurityError(f"it makes a number of more than {MOST_BITS:,} bits")


def _by_name(names: tuple[str, ...], args: list[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of these names, which may be given by position or by name."""
    by_position = dict(zip(names, args, strict=False))
    return by_position | {name: named[name] for name in names if name in named}


def _numbers(args: Any, named: Mapping[str, Any]) -> list[int]:
    return [value for value in (*args, *named.values()) if isinstance(value, int)]


def _joined_size(budget: Budget, parts: list[Any], separator: int) -> int:
    return budget.size(parts) + len(parts) * separator

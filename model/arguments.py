"""Arguments as people give them, made what the inside counts on, or refused by name.

Any kind of whole number is an integer (Python's, numpy's, a torch scalar); true, false and 2.0 are
none. One value stands for a list of one. A text is one text, never its letters. Nothing here needs
torch: tensors and arrays are known by what they have.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from .fields import shown


def is_integer(value: Any) -> bool:
    """Whether a value is one whole number, of whatever library."""
    if _is_bool(value) or _n_dims(value):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def integer(value: Any, name: str) -> int:
    """A whole number as int. Raises ValueError for anything else."""
    if not is_integer(value):
        raise _wrong(value, name, "a whole number")
    return operator.index(value)


def integers(value: Any, name: str) -> list[int]:
    """Whole numbers as a list: of one, of a sequence, or of a tensor or array [T] or [1, T].

    Raises ValueError for anything else.
    """
    if is_integer(value):
        return [operator.index(value)]
    if not _is_list(value):
        raise _wrong(value, name, "a whole number or a list of them")
    shape = getattr(value, "shape", None)
    if shape is not None:
        if len(shape) == 2 and shape[0] == 1:
            value = value[0]
        elif len(shape) != 1:
            raise ValueError(f"{name} has shape {list(shape)}: give [T] or [1, T]")
        value = value.tolist()
    return [integer(each, f"{name}[{index}]") for index, each in enumerate(value)]


def number(value: Any, name: str) -> float:
    """A finite number as float, of whatever library. Raises ValueError for anything else."""
    if _is_bool(value) or _n_dims(value) or isinstance(value, (str, bytes)):
        raise _wrong(value, name, "a number")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise _wrong(value, name, "a number") from None
    if not math.isfinite(found):
        raise ValueError(f"{name} is {found}, which is not finite")
    return found


def numbers(value: Any, name: str) -> list[float]:
    """Finite numbers as a list: of one, or of a sequence. Raises ValueError for anything else."""
    if not _is_list(value):
        return [number(value, name)]
    return [number(each, f"{name}[{index}]") for index, each in enumerate(value)]


def choice(value: Any, name: str, choices: Iterable[str]) -> str:
    """One of some texts. Raises ValueError, which lists them, for anything else."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        is_plain = isinstance(value, str) and value.isprintable() and len(value) < 60
        given = value if is_plain and value else shown(value)
        raise ValueError(f"{name} {given} does not exist: there are {', '.join(known)}")
    return value


def choices(value: Any, name: str, among: Iterable[str]) -> list[str]:
    """One or several of some texts, none twice. Raises ValueError for anything else."""
    known = list(among)
    if isinstance(value, str):
        value = [value]
    elif not _is_list(value):
        raise _wrong(value, name, f"one of {', '.join(known)}, or a list of them")
    found = [choice(each, name, known) for each in value]
    if not found:
        raise ValueError(f"no {name} is given")
    if len(set(found)) < len(found):
        twice = next(each for each in found if found.count(each) > 1)
        raise ValueError(f"{name} {twice} is given twice")
    return found


def text(value: Any, name: str) -> str:
    """A text. Raises ValueError for anything else, bytes included."""
    if not isinstance(value, str):
        raise _wrong(value, name, "a text")
    return value


def flag(value: Any, name: str) -> bool:
    """True or false. Raises ValueError for anything else, whatever its truth."""
    if not isinstance(value, bool):
        raise _wrong(value, name, "True or False")
    return value


def all_of(value: Any, kind: type | tuple[type, ...], name: str, what: str) -> list[Any]:
    """Objects of a kind as a list: one, or a sequence. Raises ValueError for anything else."""
    if isinstance(value, kind):
        return [value]
    if not _is_list(value):
        raise _wrong(value, name, what)
    found = list(value)
    for index, each in enumerate(found):
        if not isinstance(each, kind):
            raise _wrong(each, f"{name}[{index}]", what)
    return found


def of_kind(value: Any, kind: type | tuple[type, ...], name: str, what: str) -> Any:
    """An object of a kind. Raises ValueError for anything else."""
    if not isinstance(value, kind):
        raise _wrong(value, name, what)
    return value


def optional(value: Any, kind: type | tuple[type, ...], name: str, what: str) -> Any:
    """An object of a kind, or None. Raises ValueError for anything else."""
    if value is not None and not isinstance(value, kind):
        raise _wrong(value, name, what)
    return value


def _is_list(value: Any) -> bool:
    """Whether a value is several: neither a text, nor a mapping, nor a tensor of one number."""
    is_one = isinstance(value, (str, bytes, bytearray, Mapping)) or _n_dims(value, 1) == 0
    return isinstance(value, Iterable) and not is_one


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _n_dims(value: Any, otherwise: int = 0) -> int:
    """The dims of a tensor or array; `otherwise` for other objects."""
    found = getattr(value, "ndim", otherwise)
    return found if isinstance(found, int) else otherwise


def _wrong(value: Any, name: str, what: str) -> ValueError:
    is_short = isinstance(value, (str, bytes, int, float))
    given = f"{shown(value)}, " if is_short else ""
    return ValueError(f"{name} is {given}of type {type(value).__name__}: give {what}")

"""Bounds on what a chat template may take: sizes of values, memory, steps and time.

A template is a stranger's program, and a short one can ask for terabytes or run for years. Sizes
are counted before they are allocated. A template that exceeds a bound gets a SecurityError.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Set, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError

MOST_SIZE = 4_000_000  # characters of a text, or 16 for each item of a collection and its texts
MOST_BYTES = 2**28  # of all values that are made, freed or not
MOST_STEPS = 2_000_000  # turns of loops, calls, filters, comparisons
MOST_SECONDS = 10.0
MOST_BITS = 16_000  # of a whole number
MOST_DEPTH = 500  # of collections in collections
ITEM = 16


class Budget:
    """The bounds of one rendering, and how much of them is used.

    data: what the template is given, of which each collection is measured once.
    """

    def __init__(self, data: Any = None) -> None:
        self._ends_at = time.monotonic() + MOST_SECONDS
        self._n_steps = self._n_bytes = 0
        self._given: dict[int, int] = {}  # the size of each given collection, by its id
        self._measure_given(data)

    def step(self) -> None:
        """Count a step, and look at the clock."""
        self._n_steps += 1
        if self._n_steps > MOST_STEPS or time.monotonic() > self._ends_at:
            raise SecurityError(
                f"it takes more than {MOST_STEPS:,} steps or {MOST_SECONDS:g} seconds"
            )

    def charge(self, n_bytes: int) -> None:
        """Count memory that is about to be taken, or was."""
        self._n_bytes += n_bytes
        if self._n_bytes > MOST_BYTES:
            raise SecurityError(f"it takes more than {MOST_BYTES >> 20} MiB of memory")

    def check(self, size: int) -> None:
        """Refuse a size before a value of that size is made."""
        if size > MOST_SIZE:
            raise SecurityError(f"it makes a value of more than {MOST_SIZE:,} characters")

    def keep(self, value: Any) -> Any:
        """`value`, which the template made: measured and charged."""
        if isinstance(value, (str, bytes)):
            self.check(len(value))
            self.charge(sys.getsizeof(value))
        elif value is not None and not isinstance(value, (bool, float)):
            self.size(value)
            if isinstance(value, (list, tuple, set, frozenset, dict)):
                self.charge(4 * ITEM * (1 + len(value)))
        return value

    def size(self, value: Any) -> int:
        """The size of a value with all that is in it, as often as it is in it.

        Raises SecurityError for one that is too large or too deep. A generator counts as one item.
        """
        total, inner = 0, [value]
        for _ in range(MOST_DEPTH):
            here, inner = inner, []
            total += ITEM * len(here)
            for item in here:
                if isinstance(item, (str, bytes)):
                    total += len(item)
                elif isinstance(item, int):
                    if item.bit_length() > MOST_BITS:
                        raise SecurityError(f"it makes a number of more than {MOST_BITS:,} bits")
                elif id(item) in self._given:
                    total += self._given[id(item)] - ITEM
                elif children := _children(item):
                    self.check(total + ITEM * (len(children) + len(inner)))
                    inner.extend(children)
            self.check(total)
            if not inner:
                return total
        raise SecurityError(f"it makes a value of more than {MOST_DEPTH} levels")

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """The values of an iterable, each step counted where it is a generator."""
        if isinstance(values, (str, bytes, list, tuple, Mapping)):
            return list(values)
        found = []
        for value in values:
            self.step()
            found.append(value)
            self.check(ITEM * len(found))
        return found

    def _measure_given(self, value: Any) -> int:
        if not isinstance(value, (list, dict)):
            return ITEM + (len(value) if isinstance(value, str) else 0)
        size = ITEM + sum(self._measure_given(child) for child in _children(value))
        self._given[id(value)] = size
        return size


def _children(item: Any) -> list[Any] | tuple[Any, ...]:
    if isinstance(item, (list, tuple)):
        return item
    if isinstance(item, Mapping):
        return [*item, *item.values()]
    return list(item) if isinstance(item, (Set, ValuesView)) else ()  # views of a mapping, too

"""Arguments of wrong or odd types, and what may become of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


class Odd:
    """An object that is nothing of what is taken, with a hash and a comparison of its kind."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


def odd_values() -> list[Any]:
    return [
        None,
        True,
        False,
        -1,
        10**30,
        0.5,
        2.0,
        float("nan"),
        float("inf"),
        1j,
        "",
        "nonsense",
        "all",
        b"all",
        bytearray(b"x"),
        [],
        (),
        {},
        {"a": 1},
        set(),
        [None],
        ["nonsense", 3],
        [[1, 2]],
        [True],
        [2.0],
        np.float32(2.0),
        np.bool_(True),
        np.array([[1, 2], [3, 4]]),
        np.array(["x"]),
        torch.tensor(2.0),
        torch.tensor(True),
        torch.zeros(2, 2),
        torch.tensor([1.5]),
        object(),
        Odd(),
        len,
        int,
        range(0),
    ]


def try_odd_values(name: str, door: Callable[[Any], Any], taken: Sequence[Any]) -> None:
    """Each odd value is refused in one line, but for those that are `taken`."""
    for value in odd_values():
        if any(type(value) is type(known) and repr(value) == repr(known) for known in taken):
            door(value)
            continue
        try:
            found = door(value)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, (name, value)
        except Exception as error:
            raise AssertionError(f"{name} of {value!r}: {type(error).__name__}: {error}") from error
        else:
            raise AssertionError(f"{name} of {value!r} is taken: {found!r}"[:300])

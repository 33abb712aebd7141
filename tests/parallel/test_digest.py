"""A digest of values: the same in every process, and another for other values."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import torch

from shardlens.parallel import Digest


def digest(*values: Any) -> bytes:
    made = Digest()
    made.add(*values)
    return made.digest()


VALUES: list[tuple[Any, ...]] = [
    (),
    (None,),
    ("",),
    ("a",),
    ("a", "b"),
    ("ab",),
    (["a", "b"],),
    ([["a"], "b"],),
    ("1",),
    (1,),
    (1.5,),
    (float("inf"),),
    (-1,),
    ({"a": 1},),
    ({"a": 2},),
    (torch.tensor([1, 2]),),
    (torch.tensor([2, 1]),),
    (torch.tensor([[1, 2]]),),
    (torch.tensor([1, 2], dtype=torch.int32),),
    (torch.tensor([1.0, 2.0]),),
    (torch.tensor([1.0, 2.0], dtype=torch.bfloat16),),
    (torch.tensor([]),),
]


def test_different_values_have_different_digests() -> None:
    assert len({digest(*values) for values in VALUES}) == len(VALUES)
    assert all(len(digest(*values)) == 8 for values in VALUES)


def test_equal_values_have_equal_digests() -> None:
    assert digest(1, True, [2.0]) == digest(1.0, 1, (2,))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(frozenset((3, 1, 2))) == digest({2, 3, 1})
    strided = torch.arange(6.0).reshape(3, 2).T[0]
    assert digest(strided) == digest(strided.contiguous())


def test_a_digest_does_not_depend_on_the_process() -> None:
    """As Python's own hash of a text does."""
    program = (
        "from shardlens.parallel import Digest; made = Digest(); "
        "made.add('text', {'b', 'a', 'c'}, {'x': 1}); print(made.digest().hex(), hash('text'))"
    )
    printed = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        printed.append(run.stdout.split())
    assert printed[0][0] == printed[1][0] == digest("text", {"b", "a", "c"}, {"x": 1}).hex()
    assert printed[0][1] != printed[1][1]

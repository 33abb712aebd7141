"""Ranks agree on what they are asked for, on errors, and on how long they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardlens.parallel import Digest, TensorParallel, agreed, all_gather, asked_alike
from shardlens.parallel.agreement import DIGEST_BYTES, LOADING_S, waiting_long
from shardlens.parallel.collectives import MESSAGE_BYTES
from shardlens.parallel.group import TIMEOUT_S, is_lost_contact


def digest(*values: Any) -> bytes:
    made = Digest()
    made.add(*values)
    return made.digest()


# Errors of one rank


@pytest.mark.parametrize(
    "message",
    ["plain", "", "größer 数字 🙂", "x" * 5000, "é" * 600, "a" + "é" * 600, "lone \ud800 half"],
)
@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_an_error_reaches_every_rank(message: str, kind: type[Exception], run_ranks: Any) -> None:
    """As a ValueError where it is one, else with the rank's number; cut between characters."""

    def body(parallel: TensorParallel) -> tuple[type[Exception], str]:
        try:
            with agreed(parallel):
                if parallel.rank == 1:
                    raise kind(message)
        except Exception as error:
            return type(error), str(error)
        raise AssertionError("it went on")

    whole = message.encode(errors="replace")
    kept = whole[:MESSAGE_BYTES].decode(errors="ignore")
    first, second, third = run_ranks(3, body)
    assert second == (kind, message)
    expected = (ValueError, kept) if kind is ValueError else (RuntimeError, f"rank 1: {kept}")
    assert first == third == expected


def test_nothing_is_pickled(run_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks agree by is no object, and not counted as traffic."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("an object was sent")

    for name in dir(dist):
        if "object" in name:
            monkeypatch.setattr(dist, name, refuse)

    def body(parallel: TensorParallel) -> int:
        with agreed(parallel):
            pass
        with asked_alike(parallel) as asked:
            assert asked is not None
            asked.add(1)
        return parallel.traffic.total_bytes

    assert run_ranks(2, body) == [0, 0]


# Digests


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
    assert all(len(digest(*values)) == DIGEST_BYTES for values in VALUES)


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


# Calls


@pytest.mark.parametrize(
    "given, said",
    [
        ([5, 5, 5, 5], None),
        ([5, 6, 5, 5], "rank 1 differs from rank 0"),
        ([6, 5, 5, 5], "ranks 1, 2, 3 differ from rank 0"),
        ([5, 5, None, 5], "rank 2 refused what others accept"),
        ([None, 5, 5, None], "ranks 0, 3 refused what others accept"),
    ],
)
def test_ranks_that_differ_are_named(given: list[int | None], said: str, run_ranks: Any) -> None:
    """On every rank; a rank that refuses has an error of its own, and leaves nobody waiting."""

    def body(parallel: TensorParallel) -> str | None:
        value = given[parallel.rank]
        try:
            with asked_alike(parallel) as asked:
                assert asked is not None
                if value is None:
                    raise ValueError("too long")
                asked.add(value)
        except ValueError as error:
            return str(error)
        all_gather(torch.ones(1), parallel)
        return None

    for value, seen in zip(given, run_ranks(4, body), strict=True):
        if value is None:
            assert seen == "too long"
        elif said is None:
            assert seen is None
        else:
            assert said in str(seen)


def test_a_process_alone_has_nothing_to_compare() -> None:
    with asked_alike(TensorParallel.single()) as asked:
        assert asked is None


# Timeouts


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_timeout_is_a_time(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="seconds: give a number above 0"):
        TensorParallel.from_env("cpu", timeout_s)


def timeouts_of_ranks() -> tuple[float, float, float]:
    """What the group waits for: as begun, while a model is loaded, and afterwards."""
    parallel = TensorParallel.from_env("cpu", 7)
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))

    def seconds() -> float:
        return float(backend.options._timeout.total_seconds())

    before = seconds()
    with waiting_long(parallel):
        during = seconds()
    after = seconds()
    dist.destroy_process_group()
    return before, during, after


def test_ranks_have_their_timeout(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a longer one where ranks wait for files."""
    # two in the environment, one in truth: this process
    monkeypatch.setattr(dist, "init_process_group", _alone(dist.init_process_group))
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "SHARDLENS_RENDEZVOUS": f"file://{tmp_path}/ranks",
    }.items():
        monkeypatch.setenv(name, value)
    assert timeouts_of_ranks() == (7, LOADING_S, 7)
    assert TIMEOUT_S == 60


def _alone(real: Any) -> Any:
    def init(*args: Any, **options: Any) -> None:
        real(*args, **{**options, "world_size": 1})

    return init


def test_ranks_of_a_training_job_keep_their_timeout(run_ranks: Any) -> None:
    def body(parallel: TensorParallel) -> float | None:
        with waiting_long(parallel):
            return parallel.timeout_s

    assert run_ranks(2, body) == [None, None]


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed"), 1),
        (dist.DistNetworkError("no answer"), 1),
        (dist.DistStoreError("wait timeout"), 1),
        (RuntimeError("shapes cannot be multiplied"), 0),
        (ValueError("gloo/ is no device"), 0),
    ],
)
def test_lost_contact_is_no_other_error(error: Exception, expected: int) -> None:
    assert is_lost_contact(error) == bool(expected)

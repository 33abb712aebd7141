"""Ranks agree on what they are asked for, on errors, and on how long they wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardlens.parallel import (
    TensorParallel,
    agreed,
    all_gather,
    asked_alike,
    is_lost_contact,
    waiting_long,
)

MESSAGE_BYTES = 1024  # of an error, that other ranks get


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
    """Ranks agree by no object, and by nothing that counts as traffic."""

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
    """The timeout as begun, while a model is loaded, and afterwards."""
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
    assert timeouts_of_ranks() == (7, 1800, 7)


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

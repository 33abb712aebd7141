"""Many unlike requests in a few slots: each as if it were alone, no slot idle, memory flat."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from live_bytes import peak_tensor_bytes
from tolerances import EFFECT

import shardlens
from shardlens import LensSpec, Request, Result, Sampling, Steering, Trace
from shardlens.engine import loop as loop_module
from shardlens.model import DEMO

N, MAX_BATCH = 64, 8
SAMPLINGS = (Sampling(), Sampling(0.8), Sampling(1.1, top_k=20), Sampling(0.9, top_p=0.9))
LENSES = (
    None,
    LensSpec(layers="0,-1", top_k=3),
    LensSpec(points=("mlp_out", "resid_post"), layers="2-4", targets=None),
    LensSpec(layers="all", top_k=1, positions="generated"),
    LensSpec(points=("attn_norm",), layers="1", targets=7, positions="prompt"),
)
SLACK_BYTES = 4096  # small tensors of a step, which are more or fewer by what meets in it


@pytest.fixture(scope="module")
def lm() -> shardlens.LanguageModel:
    return shardlens.load("demo")


@pytest.fixture(scope="module")
def requests(lm: shardlens.LanguageModel) -> list[Request]:
    """Prompts of 1 to 70 tokens, 0 to 24 new ones, every setting mixed with every other."""
    pairs = shardlens.read_pairs(DEMO / "dispositions-cautious-bold.jsonl")
    ids = lm.tokenizer.encode("\n".join(map(str, pairs[:20])))
    stop = lm.tokenizer.encode(".", bos=False)[-1]

    def request(number: int) -> Request:
        drawn = Random(number)
        start, length = drawn.randrange(len(ids) - 70), drawn.choice([1, 2, 5, 17, 40, 70])
        sampling = SAMPLINGS[number % 4]
        if sampling.temperature:
            sampling = dataclasses.replace(sampling, seed=drawn.randrange(1000))
        vector = torch.randn(lm.model.config.d, generator=torch.Generator().manual_seed(number))
        point, positions = drawn.choice(["mlp_norm", "resid_post"]), drawn.choice(["all", "prompt"])
        steering = Steering(vector, "1-3", point, scale=0.5, positions=positions)
        return Request(
            ids[start : start + length],
            drawn.choice([0, 1, 3, 8, 24]),
            sampling,
            [steering] if number % 3 == 0 else [],
            LENSES[number % 5],
            [stop] if number % 2 else (),
        )

    return [request(number) for number in range(N)]


@pytest.fixture(scope="module")
def alone(lm: shardlens.LanguageModel, requests: list[Request]) -> list[Result]:
    return [lm.generate(request) for request in requests]


def assert_same(result: Result, expected: Result) -> None:
    """Tokens and reasons equal, traces equal to the bit."""
    assert result.token_ids == expected.token_ids and result.text == expected.text
    assert result.finish_reason == expected.finish_reason
    if expected.trace is None:
        assert result.trace is None
        return
    assert result.trace is not None
    for field in dataclasses.fields(Trace):
        found, wanted = getattr(result.trace, field.name), getattr(expected.trace, field.name)
        if isinstance(found, torch.Tensor):
            assert found.dtype == wanted.dtype, field.name
            assert torch.equal(found.isnan(), wanted.isnan()), field.name
            assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), field.name
        else:
            assert found == wanted, field.name


def test_the_requests_are_unlike(requests: list[Request], alone: list[Result]) -> None:
    assert {result.finish_reason for result in alone} == {"stop", "length", None}
    assert len({tuple(result.token_ids) for result in alone}) > N / 2
    assert sum(result.trace is not None for result in alone) > N / 2
    assert len({len(request.prompt) for request in requests}) == 6


def test_each_is_as_if_it_were_alone(
    lm: shardlens.LanguageModel, requests: list[Request], alone: list[Result]
) -> None:
    """In the order given, and in another."""
    for order in (range(N), Random(1).sample(range(N), N)):
        results = lm.generate([requests[number] for number in order], max_batch=MAX_BATCH)
        for number, result in zip(order, results, strict=True):
            assert_same(result, alone[number])


def test_the_settings_count(
    lm: shardlens.LanguageModel, requests: list[Request], alone: list[Result]
) -> None:
    """With a neighbour's settings, most requests of 8 tokens and more come out otherwise."""
    changed = 0
    long = [n for n, request in enumerate(requests) if request.max_new_tokens >= 8]
    for number in long:
        other = requests[(number + 1) % N]
        swapped = dataclasses.replace(
            requests[number], sampling=other.sampling, steering=other.steering
        )
        changed += lm.generate(swapped).token_ids != alone[number].token_ids
    assert changed > 0.6 * len(long)


@pytest.mark.parametrize("behind", [0, 1])
def test_slots_are_full_until_the_tail(
    lm: shardlens.LanguageModel,
    requests: list[Request],
    alone: list[Result],
    monkeypatch: pytest.MonkeyPatch,
    behind: int,
) -> None:
    """Also where the host looks at records a step late, as on a GPU if no nucleus is wanted."""
    asked = [n for n, each in enumerate(requests) if not behind or each.sampling.top_p == 1]
    full: list[int] = []  # slots in use, step by step
    tail: list[int] = []  # those after the last request got a slot
    init, run_step = loop_module.Loop.__init__, loop_module.Loop.run_step

    def late(self: Any, *args: Any) -> None:
        init(self, *args)
        self.steps_behind = behind

    def counted(self: Any) -> None:
        (full if self.waiting else tail).append(sum(slot is not None for slot in self.slots))
        run_step(self)

    monkeypatch.setattr(loop_module.Loop, "__init__", late)
    monkeypatch.setattr(loop_module.Loop, "run_step", counted)
    results = lm.generate([requests[number] for number in asked], max_batch=MAX_BATCH)
    for number, result in zip(asked, results, strict=True):
        assert_same(result, alone[number])
    assert len(full) > len(tail) and set(full) == {MAX_BATCH}
    assert all(before >= after for before, after in itertools.pairwise(tail))
    n_tokens = sum(len(result.token_ids) for result in results)
    surplus = sum(full) + sum(tail) - n_tokens
    n_stopped = sum(result.finish_reason == "stop" for result in results)
    assert 0 <= surplus <= behind * n_stopped, "slot steps that gave no token"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_requests(
    lm: shardlens.LanguageModel, requests: list[Request]
) -> None:
    """Rows of lenses are handed over as they come, and slots are used again."""
    few = [dataclasses.replace(each, prompt=each.prompt[:9], max_new_tokens=3) for each in requests]
    few = few[:16]
    assert any(request.lens for request in few) and any(request.steering for request in few)

    def peak(asked: Sequence[Request], max_batch: int) -> int:
        def run() -> None:
            lm.generate(asked, max_batch=max_batch, on_lens=lambda number, piece: None)

        return peak_tensor_bytes(run)

    of_few = peak(few, MAX_BATCH)
    assert peak(few * 4, MAX_BATCH) <= of_few + SLACK_BYTES
    assert peak(few, 2 * MAX_BATCH) > of_few + EFFECT * SLACK_BYTES

"""Ranks that are asked for different things stop, at the price of eight bytes per call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardlens
from shardlens import LanguageModel, LensSpec, Pair, Request, Sampling, Steering, SteeringVectors
from shardlens.model import Tap
from shardlens.parallel import TensorParallel

PROMPT = [5, 6, 7, 8, 9]
D, N_LAYERS = 128, 6
GENERATOR = torch.Generator().manual_seed(0)
LONE, OTHER = torch.randn(2, D, generator=GENERATOR)
VECTORS = SteeringVectors({Tap(layer, "resid_post"): LONE for layer in (1, 2)}, {}, N_LAYERS)
NORMED = replace(VECTORS, resid_norms={tap: 7.0 for tap in VECTORS.taps})
BENT = replace(VECTORS, vectors={tap: LONE if tap.layer == 1 else OTHER for tap in VECTORS.vectors})
BASE = Request(
    PROMPT,
    3,
    Sampling(0.7, seed=1),
    (Steering(LONE, "1,2", scale=0.5), Steering(NORMED, scale=0.5, positions="generated")),
    LensSpec(layers="0-3"),
    (3,),
)


def edited(**changes: Any) -> Request:
    return replace(BASE, steering=(replace(BASE.steering[0], **changes), BASE.steering[1]))


def read(**changes: Any) -> Request:
    assert BASE.lens is not None
    return replace(BASE, lens=replace(BASE.lens, **changes))


CHANGES = {
    "prompt": replace(BASE, prompt=[5, 6, 7, 9, 8]),
    "shorter prompt": replace(BASE, prompt=PROMPT[:-1]),
    "new tokens": replace(BASE, max_new_tokens=4),
    "temperature": replace(BASE, sampling=Sampling(0.8, seed=1)),
    "top_k": replace(BASE, sampling=Sampling(0.7, top_k=3, seed=1)),
    "top_p": replace(BASE, sampling=Sampling(0.7, top_p=0.5, seed=1)),
    "seed": replace(BASE, sampling=Sampling(0.7, seed=2)),
    "stop ids": replace(BASE, stop_ids=(4,)),
    "ends": replace(BASE, ends=lambda tokens: False),
    "no edit": replace(BASE, steering=BASE.steering[1:]),
    "order of edits": replace(BASE, steering=BASE.steering[::-1]),
    "vector": edited(vector=OTHER),
    "a number of a vector": edited(vector=torch.cat((LONE[:-1], LONE[-1:] + 1e-6))),
    "one of vectors": replace(BASE, steering=(BASE.steering[0], Steering(BENT, scale=0.5))),
    "scale": edited(scale=0.25),
    "layers": edited(layers="1,3"),
    "point": edited(point="mlp_norm"),
    "mode": edited(mode="clamp"),
    "positions": edited(positions="prompt"),
    "position": edited(positions=2),
    "list of positions": edited(positions=[2, 3]),
    "unit": replace(
        BASE, steering=(BASE.steering[0], replace(BASE.steering[1], unit="resid_norm"))
    ),
    "no lens": replace(BASE, lens=None),
    "lens's layers": read(layers="0-2"),
    "lens's points": read(points=("mlp_out",)),
    "lens's top_k": read(top_k=3),
    "lens's targets": read(targets=5),
    "lens's positions": read(positions="prompt"),
    "lens's mode": read(mode="deferred"),
}


def messages(
    run_ranks: Any, call: Callable[[LanguageModel, bool], object], ranks: int = 3
) -> list[str]:
    """The error of each rank if the last of them makes another call."""

    def body(parallel: TensorParallel) -> str:
        model = shardlens.load("demo", parallel=parallel)
        with pytest.raises(ValueError) as caught:
            call(model, parallel.rank == ranks - 1)
        return str(caught.value)

    found: list[str] = run_ranks(ranks, body)
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_another_request_is_seen(name: str, run_ranks: Any) -> None:
    def call(model: LanguageModel, other: bool) -> object:
        return model.generate([BASE, CHANGES[name] if other else BASE])

    said = messages(run_ranks, call)
    assert all("rank 2 differs from rank 0 in texts or settings" in line for line in said), said


@pytest.mark.parametrize("options", [{"max_batch": 1}, {"capture": False}])
def test_another_setting_of_the_call_is_seen(options: dict[str, Any], run_ranks: Any) -> None:
    def call(model: LanguageModel, other: bool) -> object:
        return model.generate([BASE, BASE], **(options if other else {}))

    assert all("rank 2 differs" in line for line in messages(run_ranks, call))


def test_a_rank_that_refuses_alone_leaves_nobody_waiting(run_ranks: Any) -> None:
    def call(model: LanguageModel, other: bool) -> object:
        return model.generate(replace(BASE, prompt=[10**6] if other else PROMPT))

    first, second, last = messages(run_ranks, call)
    assert first == second and "rank 2 refused" in first
    assert "outside the vocabulary" in last


def test_equal_requests_are_alike_however_they_are_given(run_ranks: Any) -> None:
    """As other types, other vectors of the same numbers, and other names of the same layers."""
    same = replace(
        BASE,
        prompt=torch.tensor(PROMPT),
        stop_ids=[3],
        steering=[
            Steering(LONE.clone(), [1, 2], "resid_post", scale=0.5),
            Steering(replace(NORMED), [1, 2], scale=0.5, positions="generated"),
        ],
        lens=LensSpec(layers=[0, 1, 2, 3]),
    )

    def body(parallel: TensorParallel) -> list[int]:
        model = shardlens.load("demo", parallel=parallel)
        return model.generate(same if parallel.rank else BASE).token_ids

    first, second = run_ranks(2, body)
    assert first == second and len(first) == 3


# Calls that run without the engine


def pairs_of(matching: str) -> list[Pair]:
    return [
        Pair("A bear stands near. Anna wants to\n(A) run\n(B) stay\nAnswer:", " (A)", " (B)"),
        Pair("A fox stands near. Hugo wants to\n(A) run\n(B) stay\nAnswer:", matching, " (A)"),
    ]


def test_other_pairs_and_vectors_are_seen(run_ranks: Any) -> None:
    def extract(model: LanguageModel, other: bool) -> object:
        pairs = pairs_of(" (B)")
        return model.extract(pairs[:1] if other else pairs, layers="1,2")

    def extract_elsewhere(model: LanguageModel, other: bool) -> object:
        return model.extract(pairs_of(" (B)"), layers="1,3" if other else "1,2")

    def measure(model: LanguageModel, other: bool) -> object:
        return model.steerability(pairs_of(" (B)"), BENT if other else VECTORS)

    def measure_more(model: LanguageModel, other: bool) -> object:
        multipliers = [-2, 2] if other else [-1, 1]
        return model.steerability(pairs_of(" (B)"), VECTORS, multipliers=multipliers)

    for call in (extract, extract_elsewhere, measure, measure_more):
        said = messages(run_ranks, call)
        assert all("rank 2 differs" in line for line in said), (call.__name__, said)


# Cost


def test_a_call_costs_eight_bytes_and_a_step_nothing(
    run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanges of whole calls that differ in their number of steps alone."""
    real, sent = dist.all_gather, {0: [], 1: []}

    def all_gather(outputs: Any, x: torch.Tensor, **options: Any) -> Any:
        sent[dist.get_rank()].append((x.dtype, x.numel() * x.element_size()))
        return real(outputs, x, **options)

    monkeypatch.setattr(dist, "all_gather", all_gather)

    def body(parallel: TensorParallel) -> tuple[list[Any], list[int]]:
        model = shardlens.load("demo", parallel=parallel)
        exchanges, counted = [], []
        for n_tokens in (2, 3, 4):
            parallel.traffic.reset()
            sent[parallel.rank].clear()
            model.generate(replace(BASE, max_new_tokens=n_tokens, stop_ids=()))
            exchanges.append(list(sent[parallel.rank]))
            counted.append(parallel.traffic.total_bytes)
        return exchanges, counted

    exchanges, counted = run_ranks(2, body)[0]
    digests = [[n for dtype, n in each if dtype == torch.uint8] for each in exchanges]
    assert digests == [[8]] * 3
    steps = [[n for dtype, n in each if dtype != torch.uint8] for each in exchanges]
    assert len(steps[1]) - len(steps[0]) == len(steps[2]) - len(steps[1]) > 0
    assert counted[1] - counted[0] == counted[2] - counted[1] > 0

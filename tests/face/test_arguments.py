"""Odd arguments at every door: a right answer, or one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from odd import try_odd_values

import shardlens
from shardlens import LensSpec, Pair, PromptForm, Request, Sampling, Steering, SteeringVectors, Tap
from shardlens.interp import Extraction, Sweep
from shardlens.model import parse_layers

PROMPT, TAP = "Anna is", Tap(1, "mlp_out")
PAIRS = [
    Pair(f"Question: The ice is thin.\n (A) {yes}\n (B) {no}", " (A)", " (B)")
    for yes, no in [("wait", "run"), ("look twice", "jump")]
]


@cache
def lm() -> shardlens.LanguageModel:
    return shardlens.load("demo", dtype=torch.float32, device="cpu")


@cache
def vectors() -> SteeringVectors:
    generator = torch.Generator().manual_seed(0)
    d, n_layers = lm().model.config.d, lm().model.config.n_layers
    found = {Tap(i, "resid_post"): torch.randn(d, generator=generator) for i in range(n_layers)}
    return SteeringVectors(found, dict.fromkeys(found, 7.0), n_layers=n_layers)


# Doors: each takes one argument and does the least that shows what became of it.
DOORS: dict[str, Callable[[Any], Any]] = {
    "lens prompt": lambda v: lm().lens(v),
    "lens points": lambda v: lm().lens(PROMPT, points=v),
    "lens layers": lambda v: lm().lens(PROMPT, layers=v),
    "lens top_k": lambda v: lm().lens(PROMPT, top_k=v),
    "lens targets": lambda v: lm().lens(PROMPT, targets=v),
    "lens positions": lambda v: lm().lens(PROMPT, positions=v),
    "lens steering": lambda v: lm().lens(PROMPT, steering=v),
    "lens max_batch": lambda v: lm().lens(PROMPT, max_batch=v),
    "generate prompt": lambda v: lm().generate(v, max_new_tokens=1),
    "generate max_new_tokens": lambda v: lm().generate(PROMPT, max_new_tokens=v),
    "generate sampling": lambda v: lm().generate(PROMPT, max_new_tokens=1, sampling=v),
    "generate lens": lambda v: lm().generate(PROMPT, max_new_tokens=1, lens=v),
    "generate steering": lambda v: lm().generate(PROMPT, max_new_tokens=1, steering=v),
    "generate stop_ids": lambda v: lm().generate(PROMPT, max_new_tokens=1, stop_ids=v),
    "generate stop": lambda v: lm().generate(PROMPT, max_new_tokens=1, stop=v),
    "generate max_batch": lambda v: lm().generate(PROMPT, max_new_tokens=1, max_batch=v),
    "Request max_new_tokens": lambda v: Request(PROMPT, max_new_tokens=v),
    "Request stop_ids": lambda v: Request(PROMPT, stop_ids=v),
    "Sampling temperature": lambda v: Sampling(temperature=v),
    "Sampling top_k": lambda v: Sampling(0.5, top_k=v),
    "Sampling top_p": lambda v: Sampling(0.5, top_p=v),
    "Sampling seed": lambda v: Sampling(seed=v),
    "LensSpec mode": lambda v: LensSpec(mode=v),
    "Steering vector": lambda v: Steering(v),
    "Steering layers": lambda v: lm().lens(PROMPT, steering=[Steering(vectors(), layers=v)]),
    "Steering point": lambda v: Steering(vectors(), point=v),
    "Steering mode": lambda v: Steering(vectors(), mode=v),
    "Steering scale": lambda v: Steering(vectors(), scale=v),
    "Steering positions": lambda v: lm().lens(PROMPT, steering=[Steering(vectors(), positions=v)]),
    "Steering unit": lambda v: Steering(vectors(), unit=v),
    "parse_layers": lambda v: parse_layers(v, 6),
    "extract pairs": lambda v: lm().extract(v),
    "extract form": lambda v: lm().extract(PAIRS, form=v),
    "Extraction point": lambda v: Extraction(point=v).taps(6),
    "Extraction layers": lambda v: Extraction(layers=v).taps(6),
    "Extraction method": lambda v: Extraction(method=v),
    "Extraction at": lambda v: Extraction(at=v),
    "Extraction contrast": lambda v: Extraction(contrast=v),
    "steerability pairs": lambda v: lm().steerability(v, vectors()),
    "steerability vectors": lambda v: lm().steerability(PAIRS, v),
    "Sweep multipliers": lambda v: Sweep(multipliers=v),
    "Sweep protocol": lambda v: Sweep(protocol=v),
    "Sweep unit": lambda v: Sweep(unit=v),
    "Sweep seed": lambda v: Sweep(seed=v),
    "PromptForm chat": lambda v: PromptForm(chat=v),
    "PromptForm answer_prefix": lambda v: PromptForm(answer_prefix=v),
    "PromptForm system": lambda v: PromptForm(chat=True, system=v),
    "PromptForm template": lambda v: PromptForm(chat=True, template=v),
    "Pair question": lambda v: Pair(v, " (A)", " (B)"),
    "Pair matching": lambda v: Pair("Q", v, " (B)"),
    "vectors select point": lambda v: vectors().select(point=v),
    "vectors select layers": lambda v: vectors().select(layers=v),
    "SteeringVectors vectors": lambda v: SteeringVectors(v, {}, 6),
    "SteeringVectors vector": lambda v: SteeringVectors({TAP: v}, {}, 6),
    "SteeringVectors norms": lambda v: SteeringVectors(vectors().vectors, v, 6),
    "SteeringVectors norm": lambda v: SteeringVectors({TAP: torch.ones(8)}, {TAP: v}, 6),
    "SteeringVectors n_layers": lambda v: SteeringVectors(vectors().vectors, {}, v),
    "embedding_rows": lambda v: lm().model.embedding_rows(v),
    "head_rows": lambda v: lm().model.head_rows(v),
    "load": lambda v: shardlens.load(v),
}
# What odd values are right at: a default, a flag, any text, any number.
TAKEN = {
    "lens prompt": ["", "nonsense", "all", [[1, 2]]],  # an empty text is its BOS
    "lens points": [],
    "lens layers": ["all", -1],
    "lens targets": [None, "all"],  # " all" is one token
    "lens positions": ["all"],
    "lens steering": [[], (), range(0), set()],
    "lens max_batch": [None, 10**30],
    "generate prompt": ["", "nonsense", "all", [[1, 2]]],
    "generate lens": [None],
    "generate steering": [[], (), range(0), set()],
    "generate stop_ids": [None, [], (), set(), range(0)],
    "generate stop": [np.array(["x"]), None, "nonsense", "all", [], (), set(), range(0)],
    "generate max_batch": [None, 10**30],
    "Request max_new_tokens": [-1, 10**30],
    "Request stop_ids": [None, -1, [], (), set(), range(0), 10**30],
    "Sampling temperature": [0.5, 2.0, np.float32(2.0), torch.tensor(2.0), 10**30],
    "Sampling top_k": [10**30],
    "Sampling top_p": [0.5],
    "Steering vector": [torch.tensor([1.5])],
    "Steering layers": ["all", -1],
    "Steering point": [None],
    "Steering scale": [-1, 0.5, 2.0, np.float32(2.0), torch.tensor(2.0), 10**30],
    "Steering positions": ["all"],
    "parse_layers": ["all", -1],
    "extract form": [None],
    "Extraction layers": ["all", -1],
    "Extraction contrast": [None],
    "PromptForm chat": [True, False],
    "PromptForm answer_prefix": [None, "", "nonsense", "all"],
    "PromptForm system": [None, "", "nonsense", "all"],
    "PromptForm template": [{}, {"a": 1}, None],
    "Pair question": ["", "nonsense", "all"],
    "Pair matching": ["nonsense", "all"],
    "vectors select point": [None],
    "vectors select layers": ["all", -1],
    "SteeringVectors vector": [torch.tensor([1.5])],
    "SteeringVectors norms": [{}],
    "SteeringVectors norm": [0.5, 2.0, np.float32(2.0), torch.tensor(2.0), 10**30],
    "SteeringVectors n_layers": [10**30],
}


@pytest.mark.parametrize("door", DOORS)
def test_odd_values_are_right_or_refused_in_one_line(door: str) -> None:
    try_odd_values(door, DOORS[door], TAKEN.get(door, []))


INTEGERS = [
    2,
    np.int64(2),
    np.uint8(2),
    np.array(2),
    torch.tensor(2),
    torch.tensor(2, dtype=torch.int32),
]


@pytest.mark.parametrize("two", INTEGERS, ids=lambda v: type(v).__name__)
def test_any_whole_number_is_an_integer(two: Any) -> None:
    """A layer that compares as 2 and hashes otherwise once read memory that nobody had filled."""
    expected = lm().lens(PROMPT, layers=[2], top_k=2, targets=2)
    trace = lm().lens(PROMPT, layers=two, top_k=two, targets=two, max_batch=two)
    assert torch.equal(trace.logprobs, expected.logprobs)
    assert torch.equal(trace.target_logprob, expected.target_logprob)
    assert trace.taps == (Tap(2, "resid_post"),) == lm().lens(PROMPT, layers=[two]).taps
    steered = [
        lm()
        .generate(
            PROMPT,
            max_new_tokens=two,
            stop_ids=stop,
            steering=Steering(vectors(), layers, positions=positions, scale=50.0),
        )
        .token_ids
        for layers, positions, stop in [([2], 2, [2]), (two, two, two), ([two], [two, 3, 4], [two])]
    ]
    assert steered[0] == steered[1] and len(steered[0]) == 2
    assert Sampling(0.5, top_k=two, seed=two) == Sampling(0.5, top_k=2, seed=2)


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda ids: np.array([ids]),
        lambda ids: torch.tensor([ids]),
    ],
)
def test_ids_of_any_kind_are_one_prompt(form: Callable[[list[int]], Any]) -> None:
    ids = lm().tokenizer.encode(PROMPT)
    expected = lm().generate(ids, max_new_tokens=3).token_ids
    result = lm().generate(form(ids), max_new_tokens=3)
    assert result.token_ids == expected
    assert lm().lens(form(ids)).token_ids.shape[0] == len(ids)


def test_what_is_given_twice_is_refused() -> None:
    for given in ([2, 2], [-1, 5], "1-3,2", torch.tensor([0, 0])):
        with pytest.raises(ValueError, match=r"layer \d is given twice"):
            lm().lens(PROMPT, layers=given)
    with pytest.raises(ValueError, match="point mlp_out is given twice"):
        LensSpec(points=("mlp_out", "mlp_out"))


def test_targets_are_a_text_an_id_or_none() -> None:
    ids = lm().tokenizer.encode(" Tesk", bos=False)
    by_text = lm().lens("The capital of Norvia is", targets=" Tesk")
    by_id = lm().lens("The capital of Norvia is", targets=ids[0])
    assert torch.equal(by_text.target_rank, by_id.target_rank)
    assert (by_text.target_rank[-1, -1] == 0) and by_text.target_logprob[-1, -1] > -0.1

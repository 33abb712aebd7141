"""Steerability: the sweep's numbers one by one, what is refused, and the packaged model's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL
from steered import edits_of
from tolerances import CHUNKING, EFFECT, LENS
from torch import Tensor

import shardlens
from shardlens.bench.models import as_transformers
from shardlens.engine import Origin, Steering, SteeringVectors, model_fingerprint
from shardlens.interp import (
    MULTIPLIERS,
    PROTOCOLS,
    Pair,
    PairIds,
    PromptForm,
    SteerabilityReport,
    Variants,
    encode_pairs,
    extract,
    propensities,
    read_pairs,
    split_pairs,
    steerability,
    suggest,
)
from shardlens.interp.suggest import MOST_PAIRS, OF_THE_LARGEST
from shardlens.model import DEMO, ModelConfig, Tap, Transformer, init_weights
from shardlens.tokenizer import Tokenizer

N_LAYERS, D = 3, 48
STEPS = (-1.0, 0.0, 0.5, 2.0)
TAPS = (Tap(0, "attn_norm"), Tap(0, "resid_post"), Tap(1, "mlp_norm"), Tap(2, "resid_post"))
PAIRS = [
    Pair(f"Question: {text}\n (A) wait\n (B) jump", *answers)
    for text, answers in {
        "The ice is thin.": (" (A)", " (B)"),
        "A bear stands near the barn.": (" (B), I jump", " (A)"),
        "The path is dark.": (" (A)", " (B) it is"),
        "A storm comes to the hill.": (" (B)", " (A)"),
        "The bridge is old.": (" (A)", " (B)"),
    }.items()
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Random, with the packaged model's vocabulary; its logits are of order 1."""
    content = {**SMALL, "architectures": ["LlamaForCausalLM"], "vocab_size": 1280}
    random = Transformer(ModelConfig.from_hf(content))
    init_weights(random, std=0.08)
    return random.eval().requires_grad_(False)


def made(**changes: Any) -> SteeringVectors:
    generator = torch.Generator().manual_seed(2)
    fields: dict[str, Any] = dict(
        vectors={tap: torch.randn(D, generator=generator) for tap in TAPS},
        resid_norms={tap: 2.0 + tap.layer for tap in TAPS},
        n_layers=N_LAYERS,
        origin=Origin(n_pairs=7),
    )
    return SteeringVectors(**{**fields, **changes})


@torch.no_grad()
def one_by_one(
    model: Transformer, pair: PairIds, vectors: SteeringVectors, protocol: str
) -> np.ndarray:
    """[P, K]: a forward pass with an edit table for each text, tap and multiplier.

    Of answers that begin with a bracket, which are edited from there on; the paper edits it alone.
    """
    label_at = pair.matching.label_at
    assert label_at is not None and pair.matching.answer_at == label_at - 1
    sides = (pair.matching.ids, pair.other.ids)
    if protocol == "paper":
        sides = (sides[0][:label_at],) * 2

    def score(ids: list[int], label: int, steering: Steering) -> float:
        edits = edits_of(model, [steering], len(ids), len(ids))
        hidden = model(torch.tensor([ids]), edits=edits)[0]
        logits = (model.norm(hidden) @ model.head.weight.T).double()
        if protocol == "paper":
            return float(logits[-1, label])
        each = logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        return float(each.sum())

    found = np.empty((len(vectors.taps), len(STEPS)))
    for row, tap in enumerate(vectors.taps):
        for column, multiplier in enumerate(STEPS):
            steering = Steering(
                vectors.at(tap), [tap.layer], tap.point, scale=multiplier, positions=label_at - 1
            )
            matching, other = (
                score(ids, label, steering)
                for ids, label in zip(sides, pair.label_ids, strict=True)
            )
            found[row, column] = matching - other
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_report_is_its_passes(protocol: str, model: Transformer, tokenizer: Tokenizer) -> None:
    """Propensities of vectors and controls, slopes as numpy fits them, and what is said besides."""
    vectors = made()
    done: list[tuple[int, int]] = []
    report = steerability(
        model,
        tokenizer,
        PAIRS,
        vectors,
        multipliers=STEPS,
        protocol=protocol,
        seed=3,
        on_progress=lambda *counts: done.append(counts),
    )
    assert done == [(number, 5) for number in range(1, 6)]
    encoded = encode_pairs(tokenizer, PAIRS, PromptForm())
    kinds = ((vectors, report.propensities), (vectors.random_like(3), report.control))
    for held, found in kinds:
        expected = np.stack([one_by_one(model, pair, held, protocol) for pair in encoded], 1)
        assert np.abs(found - expected).max() <= LENS
        unsteered = expected[..., STEPS.index(0), None]
        assert (np.abs(expected - unsteered).max((1, 2)) > EFFECT * LENS).all()
        slopes = np.polyfit(STEPS, expected.reshape(-1, len(STEPS)).T, 1)[0]
        wanted = slopes.reshape(len(TAPS), len(PAIRS))
        summaries = report.slopes if held is vectors else report.control_slopes
        for slope, each in zip(summaries, wanted, strict=True):
            assert slope.mean == pytest.approx(each.mean(), abs=LENS)
            assert slope.std == pytest.approx(each.std(ddof=1), abs=LENS)
            assert slope.negative_share == (each < 0).mean()
    unsteered = report.propensities[0, :, STEPS.index(0)]
    assert report.baseline_accuracy == (unsteered > 0).mean()
    assert report.protocol == protocol and report.unit == "vector" and report.seed == 3
    assert report.multipliers == list(STEPS) and report.taps == list(TAPS)
    assert report.balance == 0.6 and "A" in report.form and "B" in report.form
    assert report.n_train == 7
    accessibility, suggested = suggest(model, encoded)
    assert report.accessibility == accessibility and report.suggested == suggested
    json.dumps(report.to_dict())


def test_the_baseline_is_of_no_edit(model: Transformer, tokenizer: Tokenizer) -> None:
    """Also where 0 is none of the multipliers, and all of them decide who wins."""

    def found(*steps: float) -> SteerabilityReport:
        return steerability(model, tokenizer, PAIRS, made(), multipliers=steps)

    baseline = found(*STEPS).baseline_accuracy
    either = (found(-40, 40), found(40, -40))
    assert [report.baseline_accuracy for report in either] == [baseline] * 2
    first, second = ((report.propensities[0, :, 0] > 0).mean() for report in either)
    assert first != second


def test_a_control_is_as_long_and_drawn_from_the_seed(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Variants] = []
    real = propensities

    def watched(model: Transformer, item: Any, variants: Variants) -> Tensor:
        tried.append(variants)
        return real(model, item, variants)

    monkeypatch.setattr(import_module("shardlens.interp.steerability"), "propensities", watched)

    def found(seed: int) -> SteerabilityReport:
        return steerability(model, tokenizer, PAIRS, made(), multipliers=STEPS, seed=seed)

    first_run, again, other = found(1), found(1), found(2)
    norms = tried[0].vectors.double().norm(dim=1)
    assert len(norms) == 2 * len(TAPS)
    torch.testing.assert_close(norms[: len(TAPS)], norms[len(TAPS) :], rtol=1e-6, atol=0)
    assert tried[0].scales.tolist() == [*(STEPS * (2 * len(TAPS))), 0]
    cosines = torch.nn.functional.cosine_similarity(*tried[0].vectors.chunk(2))
    assert (cosines.abs() < 0.7).all()  # 5 standard deviations of random directions in 48 dims
    assert json.dumps(first_run.to_dict()) == json.dumps(again.to_dict())
    assert np.array_equal(first_run.propensities, again.propensities)
    assert np.array_equal(first_run.control, again.control)
    assert np.array_equal(first_run.propensities, other.propensities)
    assert np.abs(first_run.control - other.control).max() > EFFECT * LENS


def test_the_same_on_ranks(model: Transformer, tokenizer: Tokenizer, run_ranks: Any) -> None:
    def body(parallel: Any) -> SteerabilityReport:
        held = Transformer(model.config, parallel=parallel)
        init_weights(held, std=0.08)
        held.eval().requires_grad_(False)
        return steerability(held, tokenizer, PAIRS, made(), multipliers=STEPS)

    alone = steerability(model, tokenizer, PAIRS, made(), multipliers=STEPS)
    assert alone.accessibility is not None
    for report in run_ranks(2, body):
        assert np.abs(report.propensities - alone.propensities).max() <= CHUNKING
        assert np.abs(report.control - alone.control).max() <= CHUNKING
        np.testing.assert_allclose(report.accessibility, alone.accessibility, atol=CHUNKING)
        assert report.suggested == alone.suggested


def test_pairs_of_the_vectors_are_left_out(model: Transformer, tokenizer: Tokenizer) -> None:
    origin = Origin(model_fingerprint(model), n_pairs=2, pair_keys=(PAIRS[0].key, PAIRS[3].key))
    report = steerability(model, tokenizer, PAIRS, made(origin=origin), multipliers=STEPS)
    assert report.n_items == 3 and report.n_train == 2
    assert report.warnings[0] == "2 pairs that the vectors were made from are left out"
    rest = [PAIRS[index] for index in (1, 2, 4)]
    plain = steerability(model, tokenizer, rest, made(), multipliers=STEPS)
    assert np.array_equal(report.propensities, plain.propensities)
    assert not any("left out" in warning for warning in plain.warnings)
    elsewhere = dataclasses.replace(origin, model="f" * 16)
    other_warnings = steerability(
        model, tokenizer, rest, made(origin=elsewhere), multipliers=STEPS
    ).warnings
    assert "f" * 16 in other_warnings[0] and not any(
        "left out" in warning for warning in other_warnings
    )


TWO_QUESTIONS = Pair("Question: x", " (A)", " (B)", other_question="Question: y")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(vectors=made(vectors={Tap(1, "mlp_out"): torch.ones(47)}, resid_norms={})),
         "the steering vectors have 47 numbers, the states of this model 48"),
        (dict(vectors=made(n_layers=4)),
         "the steering vectors are for a model of 4 layers, this one has 3"),
        (dict(multipliers=[1.0]), "a slope needs at least two different multipliers"),
        (dict(multipliers=[2.0, 2.0]), "a slope needs at least two different multipliers"),
        (dict(multipliers=[0.0, float("nan")]), "multipliers[1] is nan, which is not finite"),
        (dict(protocol="p"), "protocol p does not exist: there are paper, steering-bench"),
        (dict(unit="norm"), "steering unit norm does not exist: there are vector, resid_norm"),
        (dict(unit="resid_norm", vectors=made(resid_norms={})),
         "the vectors come without the norm of the states at attn_norm of layer 0: "
         "give scales in units of the vector"),
        (dict(layers=[1], point="resid_post"),
         "the steering vectors have none at layer 1, resid_post: they have layers 0, 2"),
        (dict(layers="2", point="mlp_norm"),
         "the steering vectors have none at layer 2, mlp_norm: they have layers 1"),
        (dict(point="mlp_out"),
         "the steering vectors have none at mlp_out: they have attn_norm, mlp_norm, resid_post"),
        (dict(layers="5"), "layer 5 does not exist: the model has layers 0 to 2"),
        (dict(vectors=made(origin=Origin(pair_keys=tuple(pair.key for pair in PAIRS)))),
         "no pair is left to measure on: the vectors were made from all of them"),
        (dict(pairs=[]), "no pair is given"),
        (dict(pairs=[*PAIRS, TWO_QUESTIONS]),
         "pair 6: its answers follow different texts: a propensity is of one question"),
        (dict(pairs=[Pair("Question: x", "Yes", "No")]),
         'pair 1: the label "Yes" is 2 tokens (" Y", "es"): choose pairs whose answers differ in '
         "one token"),
        (dict(pairs=[Pair("x " * 120, " (A)", " (B)")]),
         "a pair has 245 tokens, more than the context of 128"),
    ],
)  # fmt: skip
def test_refused(
    options: dict[str, Any], message: str, model: Transformer, tokenizer: Tokenizer
) -> None:
    given = dict(pairs=PAIRS, vectors=made(), multipliers=STEPS) | options
    pairs, vectors = given.pop("pairs"), given.pop("vectors")
    with pytest.raises(ValueError) as raised:
        steerability(model, tokenizer, pairs, vectors, **given)  # type: ignore[arg-type]
    assert str(raised.value) == message and "\n" not in message


def test_a_unit_is_a_scale_of_each_tap(model: Transformer, tokenizer: Tokenizer) -> None:
    """resid_norm: one unit adds as much as the states there are long."""
    vectors = made()
    report = steerability(
        model, tokenizer, PAIRS, vectors, multipliers=STEPS, unit="resid_norm", protocol="paper"
    )
    assert report.unit == "resid_norm"
    plain = steerability(model, tokenizer, PAIRS, vectors, multipliers=STEPS)
    for index, tap in enumerate(TAPS):
        factor = (2.0 + tap.layer) / vectors.norm(tap)
        by_hand = steerability(
            model,
            tokenizer,
            PAIRS,
            vectors.restricted([tap]),
            multipliers=[factor * step for step in STEPS],
        )
        assert np.abs(report.propensities[index] - by_hand.propensities[0]).max() <= CHUNKING
        away = np.abs(report.propensities[index] - plain.propensities[index]).max()
        assert away > EFFECT * CHUNKING


def test_taps_can_be_chosen(model: Transformer, tokenizer: Tokenizer) -> None:
    """A tap's numbers stay the same, whichever others are tried beside it."""

    def found(**options: Any) -> SteerabilityReport:
        return steerability(model, tokenizer, PAIRS, made(), multipliers=STEPS, **options)

    whole = found()
    for options, taps in (
        (dict(point="resid_post"), [TAPS[1], TAPS[3]]),
        (dict(point="resid_post", layers=[-1]), [TAPS[3]]),
        (dict(point="mlp_norm"), [TAPS[2]]),
        (dict(point="attn_norm", layers="0"), [TAPS[0]]),
    ):
        part = found(**options)
        assert part.taps == taps
        kept = [TAPS.index(tap) for tap in taps]
        assert np.abs(part.propensities - whole.propensities[kept]).max() <= CHUNKING
        others = [index for index in range(len(TAPS)) if index not in kept]
        for other in others:
            gap = np.abs(part.propensities - whole.propensities[other]).max()
            assert gap > EFFECT * CHUNKING


def test_one_tap_has_two_names(model: Transformer, tokenizer: Tokenizer) -> None:
    v = torch.randn(D)
    after, before = (
        steerability(
            model,
            tokenizer,
            PAIRS,
            made(vectors={tap: v}, resid_norms={}),
            multipliers=STEPS,
        )
        for tap in (Tap(0, "resid_post"), Tap(1, "resid_pre"))
    )
    assert after.taps != before.taps
    assert np.array_equal(after.propensities, before.propensities)
    assert np.array_equal(after.control, before.control)
    assert np.ptp(after.propensities, axis=-1).min() > EFFECT * LENS


@torch.no_grad()
def gaps_of(hf: Any, pair: PairIds) -> Tensor:
    """[L]: how far apart transformers' states hold the two labels, through its norm and head."""
    states: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    handles = [layer.register_forward_hook(keep) for layer in hf.model.layers]
    ids = torch.tensor([pair.matching.ids[: pair.matching.label_at]])
    last = hf(ids, use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    logprobs = hf.lm_head(hf.model.norm(torch.stack(states))).log_softmax(-1)
    torch.testing.assert_close(logprobs[-1], last.log_softmax(-1))
    matching, other = pair.label_ids
    return (logprobs[:, matching] - logprobs[:, other]).abs()


@pytest.fixture(scope="module")
def demo() -> tuple[Transformer, Tokenizer]:
    lm = shardlens.load("demo", dtype=torch.float32)
    return lm.model, lm.tokenizer


def dispositions(name: str) -> list[Pair]:
    return read_pairs(DEMO / f"dispositions-{name}.jsonl")


def test_accessibility_is_how_far_apart_the_lens_holds_the_answers(
    demo: tuple[Transformer, Tokenizer],
) -> None:
    """Against transformers in float64; pairs beyond the first ones do not count."""
    model, tokenizer = demo
    pairs = dispositions("cautious-bold")[: MOST_PAIRS + 6]
    encoded = encode_pairs(tokenizer, pairs, PromptForm())
    hf = as_transformers(model, torch.float64)
    gaps = torch.stack([gaps_of(hf, pair) for pair in encoded])
    expected = gaps[:MOST_PAIRS].mean(0)
    found, suggested = suggest(model, encoded)
    assert (torch.tensor(found, dtype=torch.float64) - expected).abs().max() <= LENS
    assert (gaps.mean(0) - expected).abs().max() > EFFECT * LENS
    near = [layer for layer, gap in enumerate(expected) if gap >= 0.9 * expected.max()]
    assert suggested == Tap(near[0], "resid_post")


def test_the_first_of_layers_that_are_alike_is_suggested(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode_pairs(tokenizer, PAIRS, PromptForm())

    def suggested(*gaps: float) -> int:
        module = import_module("shardlens.interp.suggest")
        monkeypatch.setattr(module, "_gaps", lambda *_: torch.tensor(gaps).double())
        return suggest(model, encoded)[1].layer

    assert OF_THE_LARGEST == 0.9
    assert suggested(0.1, 0.95, 1.0, 0.99) == 1
    assert suggested(0.1, 0.89, 1.0, 0.99) == 2
    assert suggested(0.1, 0.5, 0.6, 1.0) == 3


POLES = ("cautious-bold", "cheerful-gloomy", "honest-flattering", "patient-hasty")
N_TESTED = 24
Measured = Callable[[str], SteerabilityReport]


@pytest.fixture(scope="module")
def measured(demo: tuple[Transformer, Tokenizer]) -> Measured:
    """Effects of vectors of described characters at layer 2, on questions not used for them."""
    model, tokenizer = demo
    reports: dict[str, SteerabilityReport] = {}

    def of(name: str) -> SteerabilityReport:
        if name not in reports:
            train, test = split_pairs(dispositions(name), 0.4, 0)
            first, second = name.split("-")
            texts = (f"Anna is {first}.", f"Anna is {second}.")
            vectors = extract(model, tokenizer, train, contrast=texts, layers="1-5")
            reports[name] = steerability(model, tokenizer, test[:N_TESTED], vectors, layers="2")
        return reports[name]

    return of


@pytest.mark.parametrize("name", POLES)
def test_the_packaged_model_is_steered(name: str, measured: Measured) -> None:
    report = measured(name)
    assert report.taps == [Tap(2, "resid_post")] and report.n_items == N_TESTED
    assert report.n_train == 80 and report.multipliers == list(MULTIPLIERS)
    slope, control = report.slopes[0], report.control_slopes[0]
    assert slope.mean > 0 and slope.low > 0 and slope.low > control.high
    assert report.differences[0][1] > 0
    assert slope.spearman >= 0.9 and slope.negative_share < 0.15


def test_the_layer_to_steer_is_suggested(measured: Measured) -> None:
    suggested = [measured(name).suggested for name in POLES]
    assert suggested.count(Tap(2, "resid_post")) >= 3

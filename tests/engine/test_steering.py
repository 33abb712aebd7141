"""Edits against transformers moved by hooks: one, several that meet, and those refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import hf_model, save
from steered import (
    IDS,
    N_PROMPT,
    POSITIONS,
    SCALE,
    direction,
    forced,
    load,
    miss,
    oracle,
    vectors_at,
)
from tolerances import EFFECT, PASSES

import shardlens
from shardlens.engine import Steering, SteeringVectors
from shardlens.kernels import MODES
from shardlens.model import POINTS, Tap
from shardlens.parallel import TensorParallel


@pytest.fixture(scope="module", params=["llama-mha", "qwen3"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = hf_model(request.param, num_attention_heads=4, num_key_value_heads=4)
    return model.double(), save(model.float(), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("rule", list(POSITIONS), ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", POINTS)
def test_every_point_mode_and_rule(
    case: tuple[Any, Path], point: str, mode: str, rule: Any
) -> None:
    hf, directory = case
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    steering = Steering(vector, (0, 2), point, mode, SCALE[mode], rule)
    model = load(directory, TensorParallel.single())
    expected = oracle(hf, [steering])
    first = POSITIONS[rule][0]
    assert miss(forced(model, [steering]), expected) <= PASSES
    bare = oracle(hf, [])
    assert miss(bare[:first], expected[:first]) <= PASSES if first else True
    assert miss(bare[first:], expected[first:]) > EFFECT * PASSES


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("point", POINTS)
def test_on_ranks(case: tuple[Any, Path], point: str, ranks: int, run_ranks: Any) -> None:
    """As read by the lens of the model's own output, under edits of a batch's second request."""
    hf, directory = case
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    steering = Steering(vector, (1,), point, "add", 0.8, 5)
    expected = oracle(hf, [steering])

    def body(parallel: TensorParallel) -> None:
        lm = shardlens.LanguageModel(load(directory, parallel))
        lens = shardlens.LensSpec(layers=[-1], top_k=5)
        unmoved, moved = lm.generate(
            [
                shardlens.Request(IDS[:7], max_new_tokens=0, lens=lens),
                shardlens.Request(IDS, max_new_tokens=0, lens=lens, steering=[steering]),
            ]
        )
        assert moved.trace is not None and unmoved.trace is not None
        logprobs = expected.gather(-1, moved.trace.token_ids[:, 0])
        assert (moved.trace.logprobs[:, 0] - logprobs).abs().max() <= PASSES
        bare = oracle(hf, []) if parallel.rank == 0 else None
        if bare is not None:
            logprobs = bare[:7].gather(-1, unmoved.trace.token_ids[:, 0])
            assert (unmoved.trace.logprobs[:, 0] - logprobs).abs().max() <= PASSES

    run_ranks(ranks, body)


def edit(
    seed: int, mode: str, positions: Any, point: str, layers: tuple[int, ...] = (0, 2)
) -> Steering:
    return Steering(direction(seed), layers, point, mode, SCALE[mode], positions)


def assert_composed(
    case: tuple[Any, Path], edits: list[Steering], *, commute: bool = False
) -> None:
    """As one after another; without any one of them, or in reversed order, it is far off."""
    hf, directory = case
    expected = oracle(hf, edits)
    assert miss(forced(load(directory, TensorParallel.single()), edits), expected) <= PASSES
    assert miss(oracle(hf, []), expected) > EFFECT * PASSES
    for left_out in range(len(edits)):
        rest = edits[:left_out] + edits[left_out + 1 :]
        assert miss(oracle(hf, rest), expected) > EFFECT * PASSES
    backwards = miss(oracle(hf, edits[::-1]), expected)
    assert backwards < 1e-9 if commute else backwards > EFFECT * PASSES


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_every_pair_of_modes(case: tuple[Any, Path], first: str, second: str) -> None:
    """Edits that share positions 5 to 10 of the prompt's 0 to 10 and of all from 5 on."""
    edits = [edit(1, first, "prompt", "resid_mid"), edit(2, second, 5, "resid_mid")]
    assert_composed(case, edits, commute=first == second == "add")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_a_pair_at_every_point(case: tuple[Any, Path], point: str, flip: bool) -> None:
    """Decoded positions 12 to 18 are edited by one of them, or by both at 12 alone."""
    edits = [edit(1, "clamp", (0, 3, 12), point), edit(2, "add_keep_norm", 5, point, (2,))]
    assert_composed(case, edits[::-1] if flip else edits)


@pytest.mark.parametrize("point", ["resid_post", "mlp_norm", "mlp_out"])
def test_three_deep(case: tuple[Any, Path], point: str) -> None:
    """And a fourth that meets only some, on fewer layers."""
    assert_composed(
        case,
        [
            edit(1, "add", "all", point),
            edit(2, "clamp", 5, point),
            edit(3, "ablate", "last_prompt", point, (2,)),
            edit(4, "add_keep_norm", "generated", point, (0, 1)),
        ],
    )


def test_pairs_at_all_points_at_once(case: tuple[Any, Path]) -> None:
    edits = [
        edit(2 * number + nth, mode, rule, point, (1,))
        for number, point in enumerate(POINTS)
        for nth, (mode, rule) in enumerate([("ablate", 5), ("add", "all")])
    ]
    hf, directory = case
    expected = oracle(hf, edits)
    assert miss(forced(load(directory, TensorParallel.single()), edits), expected) <= PASSES
    assert miss(oracle(hf, edits[::-1]), expected) > EFFECT * PASSES
    assert miss(oracle(hf, []), expected) > EFFECT * PASSES


def test_one_tap_has_two_names(case: tuple[Any, Path]) -> None:
    model = load(case[1], TensorParallel.single())
    v = direction(1)
    post, pre = Steering(v, [0], "resid_post"), Steering(v, [1], "resid_pre")
    assert torch.equal(forced(model, [post]), forced(model, [pre]))
    assert not torch.equal(forced(model, [post]), forced(model, []))


@pytest.mark.parametrize("flip", [False, True])
def test_edits_meet_under_either_name(case: tuple[Any, Path], flip: bool) -> None:
    """In the order of the list, though the one point comes after the other."""
    edits = [edit(1, "clamp", 5, "resid_post", (0,)), edit(2, "add", "all", "resid_pre", (1,))]
    assert_composed(case, edits[::-1] if flip else edits)


def test_edits_of_one_request_apart(case: tuple[Any, Path]) -> None:
    model = load(case[1], TensorParallel.single())
    v = direction(1)
    whole = Steering(v, [1], "mlp_norm")
    halves = [Steering(v, [1], "mlp_norm", positions=rule) for rule in ("prompt", N_PROMPT)]
    assert torch.equal(forced(model, [whole]), forced(model, halves))


def test_points_of_vectors() -> None:
    """The only one that they have; of a lone tensor, resid_post."""
    assert Steering(vectors_at((1, "mlp_norm"), (0, "mlp_norm"))).taps(3) == [
        Tap(0, "mlp_norm"), Tap(1, "mlp_norm")
    ]  # fmt: skip
    assert Steering(direction(1), [1]).taps(3) == [Tap(1, "resid_post")]
    assert Steering(direction(1), [1]).point == "resid_post"


HOLEY = torch.full((48,), float("nan"))
RULES = "all, prompt, generated, last_prompt, label, a first position, or a list of positions"
TWO = vectors_at((0, "mlp_out"), (2, "mlp_out"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(vector=[1.0]), "a steering vector is a tensor, not a list"),
        (dict(vector=torch.ones(2, 48)), "the steering vector has shape [2, 48]: it needs one dim"),
        (dict(vector=HOLEY), "the steering vector is not finite"),
        (dict(vector=torch.zeros(48)), "the steering vector is all zeros: it has no direction"),
        (dict(scale=float("inf")), "the steering scale is inf, which is not finite"),
        (dict(scale=float("nan")), "the steering scale is nan, which is not finite"),
        (dict(point="resid"), f"point resid does not exist: there are {', '.join(POINTS)}"),
        (
            dict(mode="subtract"),
            f"steering mode subtract does not exist: there are {', '.join(MODES)}",
        ),
        (dict(positions="labels"), f"steering positions 'labels': there are {RULES}"),
        (dict(positions=True), f"steering positions True: there are {RULES}"),
        (dict(positions=[2, False]), f"steering positions [2, False]: there are {RULES}"),
        (dict(positions=1.5), f"steering positions 1.5: there are {RULES}"),
        (dict(positions=None), f"steering positions None: there are {RULES}"),
        (dict(positions=["2"]), f"steering positions ['2']: there are {RULES}"),
        (dict(positions=[]), "steering positions are an empty list: name at least one"),
        (
            dict(positions=-1),
            "steering position -1 is below 0: positions count from the text's start",
        ),
        (
            dict(positions=[4, -2]),
            "steering position -2 is below 0: positions count from the text's start",
        ),
        (dict(unit="norm"), "steering unit norm does not exist: there are vector, resid_norm"),
        (
            dict(unit="resid_norm"),
            "unit resid_norm needs SteeringVectors, which know the norm of the states: "
            "a plain tensor does not",
        ),
        (
            dict(vector=TWO, unit="resid_norm", mode="ablate"),
            "unit resid_norm does not apply to mode ablate, whose scale is the fraction removed",
        ),
        (
            dict(vector=vectors_at((1, "mlp_out"), norm=None), unit="resid_norm"),
            "the vectors come without the norm of the states at mlp_out of layer 1: "
            "give scales in units of the vector",
        ),
        (
            dict(vector=vectors_at((0, "mlp_out"), (1, "attn_out"))),
            "the steering vectors have points attn_out, mlp_out: name one of them",
        ),
        (
            dict(vector=TWO, point="mlp_norm"),
            "the steering vectors have none at mlp_norm: they have mlp_out",
        ),
        (
            dict(vector=TWO, layers="0-1"),
            "the steering vectors have none at layer 1, mlp_out: they have layers 0, 2",
        ),
        (
            dict(vector=TWO, layers=[3]),
            "layer 3 does not exist: the model has layers 0 to 2",
        ),
        (
            dict(vector=SteeringVectors({Tap(1, "mlp_out"): torch.ones(47)}, {}, 3)),
            "the steering vectors have 47 numbers, the states of this model 48",
        ),
        (
            dict(vector=SteeringVectors({Tap(1, "mlp_out"): torch.ones(48)}, {}, 4)),
            "the steering vectors are for a model of 4 layers, this one has 3",
        ),
        (
            dict(vector=torch.ones(47)),
            "the steering vector has 47 numbers, the states of this model 48",
        ),
        (dict(layers=[3]), "layer 3 does not exist: the model has layers 0 to 2"),
    ],
)
def test_refused(case: tuple[Any, Path], options: dict[str, Any], message: str) -> None:
    model = load(case[1], TensorParallel.single())
    with pytest.raises(ValueError) as raised:
        steering = Steering(**{"vector": torch.ones(48), **options})
        shardlens.LanguageModel(model).generate(IDS, steering=[steering])
    assert str(raised.value) == message


def test_an_edit_that_touches_nothing_is_refused(case: tuple[Any, Path]) -> None:
    """Positions that no pass of the text will have, such as that of the last new token."""
    lm = shardlens.LanguageModel(load(case[1], TensorParallel.single()))
    v, prompt = direction(1), IDS[:4]

    def edited(positions: Any, n_new: int) -> list[int]:
        edit = Steering(v, point="resid_post", scale=30.0, positions=positions)
        result = lm.generate(prompt, max_new_tokens=n_new, stop_ids=(), steering=edit)
        return result.token_ids

    for positions, n_new in [([500], 8), (400, 8), ("label", 1), (4, 1), ([11], 8), (10**30, 8)]:
        with pytest.raises(ValueError, match="touches nothing of the prompt, of which positions 0"):
            edited(positions, n_new)
    plain = lm.generate(prompt, max_new_tokens=1, stop_ids=()).token_ids
    assert edited("generated", 1) == edited("last_prompt", 1) == edited(3, 1) != plain
    assert edited([10], 8)
    reads = lm.lens(prompt, positions="generated", steering=Steering(v, positions="generated"))
    assert reads.positions.tolist() == [3]

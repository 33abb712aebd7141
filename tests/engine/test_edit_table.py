"""Tables of edits: their shapes, what a batch and a refilled table make of them, what taps see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import SMALL, hf_model, save
from running import requests_of
from steered import (
    IDS,
    N_PROMPT,
    SCALE,
    direction,
    edit_table,
    edited,
    forced,
    load,
    miss,
    oracle,
    vectors_at,
)
from tolerances import EFFECT, PASSES
from torch import Tensor

import shardlens
from shardlens.engine import Steering
from shardlens.engine.edit_table import EditTable, RequestEdits, TableShape
from shardlens.kernels import MODES
from shardlens.model import POINTS, ModelConfig, RowTaps, Tap, TapBuffer, Transformer
from shardlens.parallel import TensorParallel

CONFIG = ModelConfig.from_hf({**SMALL, "architectures": ["LlamaForCausalLM"]})
V = direction(1)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = hf_model("qwen3", num_attention_heads=4, num_key_value_heads=4)
    return model.double(), save(model.float(), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def model(case: tuple[Any, Path]) -> Transformer:
    return load(case[1], TensorParallel.single())


def shape_of(*steerings: Steering, capacity: int = 19) -> TableShape:
    shape = TableShape.of([RequestEdits(steerings, N_PROMPT, capacity, CONFIG.n_layers)])
    assert shape is not None
    return shape


def edits_of_prompts(*requests: tuple[Sequence[Steering], int]) -> list[RequestEdits]:
    return [RequestEdits(*request, 19, CONFIG.n_layers) for request in requests]


def at(positions: Any, point: str = "mlp_norm", layers: Any = "all") -> Steering:
    return Steering(V, layers, point, positions=positions)


@pytest.mark.parametrize(
    "edits, n_passes",
    [
        ([at("all")], {"mlp_norm": 1}),
        ([at("prompt"), at(N_PROMPT)], {"mlp_norm": 1}),
        ([at("prompt"), at("generated")], {"mlp_norm": 2}),  # both have the prompt's last
        ([at("prompt"), at("label")], {"mlp_norm": 1}),
        ([at("generated"), at("label")], {"mlp_norm": 2}),
        ([at("all"), at(18)], {"mlp_norm": 2}),
        ([at("prompt"), at("generated"), at("all")], {"mlp_norm": 3}),
        # the last meets the second alone, which meets the first
        ([at("prompt"), at((3, 12)), at("generated")], {"mlp_norm": 3}),
        ([at("all", layers=[0]), at("all", layers=[1])], {"mlp_norm": 1}),
        ([at("all"), at("all"), at("all", "resid_post")], {"resid_pre": 1, "mlp_norm": 2}),
        ([at(0, "resid_post", [0]), at(5, "resid_pre", [1])], {"resid_pre": 2}),
        ([at(5), at((30,))], {"mlp_norm": 1}),  # where the table's capacity does not reach
    ],
)
def test_passes_only_where_edits_meet(edits: list[Steering], n_passes: dict[str, int]) -> None:
    shape = shape_of(*edits)
    assert dict(zip(shape.points, shape.n_passes, strict=True)) == n_passes


def test_requests_do_not_meet() -> None:
    shape = TableShape.of(edits_of_prompts(([at("all")], 4), ([], 2), ([at("all")], 9)))
    assert shape is not None and shape.n_passes == (1,)
    assert TableShape.of(edits_of_prompts(([], 4), ([], 2))) is None


def test_rows_of_vectors_are_shared() -> None:
    """One for each vector and mode, whatever the scales, positions and requests."""
    vectors = vectors_at(*((layer, "mlp_norm") for layer in range(3)))

    def n_vectors(*steerings: Steering) -> int:
        shape = TableShape.of(edits_of_prompts((steerings, 4)) * 10)
        assert shape is not None
        return shape.n_vectors

    assert n_vectors(*(Steering(vectors, scale=number) for number in range(1, 9))) == 8
    assert n_vectors(*(at(rule) for rule in range(9))) == 8
    assert n_vectors(*(Steering(vectors, mode=mode) for mode in MODES)) == 16  # for 4 x 3
    assert n_vectors(*(at("all") for _ in range(8)), *map(Steering, torch.randn(9, 48))) == 16


def test_a_shape_covers_what_has_no_more_of_anything() -> None:
    lone, pair = shape_of(at("all")), shape_of(at("all"), at("all"))
    apart = shape_of(at("prompt"), at(N_PROMPT))
    assert pair.covers(pair) and pair.covers(lone) and pair.covers(apart)
    assert not lone.covers(pair) and not apart.covers(pair)
    elsewhere = shape_of(at("all"), at("all", "attn_out"), at("all", "attn_out"))
    assert not elsewhere.covers(pair) and not pair.covers(elsewhere)
    assert elsewhere.covers(lone)
    for size in ("n_vectors", "n_masks", "n_alternatives"):
        more = dataclasses.replace(pair, **{size: 2 * getattr(pair, size)})
        assert more.covers(pair) and not pair.covers(more)


def table(model: Transformer, steerings: list[list[Steering]], lengths: list[int]) -> EditTable:
    return edit_table(list(zip(steerings, lengths, strict=True)), len(IDS), model)


def hidden(model: Transformer, edits: EditTable | None, n_requests: int) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS] * n_requests), edits=None if edits is None else edits.at)


def test_refilled_tables_forget_what_was(model: Transformer) -> None:
    """A table of three passes, filled with less, for fewer requests, and for none."""
    deep = [Steering(direction(n), mode=MODES[n], scale=2.0) for n in range(3)]
    other = [Steering(direction(7), [1], positions=5, scale=2.0)]
    edits = table(model, [deep, deep], [N_PROMPT, 4])
    for steerings in ([other, []], [[], []], [[], deep[1:]], [deep, deep]):
        for slot, steering in enumerate(steerings):
            n_prompt = [N_PROMPT, 4][slot]
            edits.put(slot, RequestEdits(steering, n_prompt, len(IDS), CONFIG.n_layers))
        found = hidden(model, edits, 2)
        for request, steering in enumerate(steerings):
            alone = table(model, [steering], [[N_PROMPT, 4][request]]) if steering else None
            assert miss(found[request], hidden(model, alone, 1)[0]) <= PASSES
    made = [hidden(model, None, 1)]
    for steering in (other, deep[1:], deep):
        made.append(hidden(model, table(model, [steering], [4]), 1))
        assert all(miss(made[-1], before) > EFFECT * PASSES for before in made[:-1])


PROMPTS = [IDS[:4], IDS[4:15], IDS[8:15]]
STEERINGS = [
    [
        Steering(direction(1), "all", "resid_post", "clamp", 2.0, 2),
        Steering(vectors_at((0, "resid_pre"), (2, "resid_pre")), scale=0.5, unit="resid_norm"),
        Steering(direction(3), "1", "resid_post", "ablate", 1.0, "generated"),
        Steering(direction(4), "1", "attn_out", "add", 0.8, "label"),
    ],
    [],
    [
        Steering(direction(5), "1", "mlp_norm", "add_keep_norm", 2.0, "last_prompt"),
        Steering(direction(6), "all", "mlp_norm", "add", 0.8, [6, 7, 9]),
        Steering(direction(7), [1, 2], "mlp_norm", "clamp", 3.0, 5),
    ],
]
SPEC = shardlens.LensSpec(points=("resid_mid", "mlp_norm", "resid_post"), top_k=4)


def generated(model: Transformer, requests: list[int], *, backwards: bool = False) -> list[Any]:
    """Traces of those requests, run as one batch."""
    results = shardlens.LanguageModel(model).generate(
        [
            shardlens.Request(
                PROMPTS[request],
                5,
                steering=STEERINGS[request][:: -1 if backwards else 1],
                lens=SPEC,
                stop_ids=(),
            )
            for request in requests
        ]
    )
    return [result.trace for result in results]


@pytest.mark.parametrize("requests", [[0, 1, 2], [2, 0], [1, 0]])
def test_a_batch_is_each_alone(model: Transformer, requests: list[int]) -> None:
    for request, trace in zip(requests, generated(model, requests), strict=True):
        (alone,) = generated(model, [request])
        assert torch.equal(trace.token_ids, alone.token_ids)
        for name in ("logprobs", "entropy", "kl_to_final"):
            assert miss(getattr(trace, name), getattr(alone, name)) <= PASSES, name
        if STEERINGS[request]:
            n = len(PROMPTS[request])  # from there on texts may differ too
            bare = shardlens.LanguageModel(model).lens(PROMPTS[request], points=SPEC.points)
            assert miss(bare.entropy[:n], alone.entropy[:n]) > EFFECT * PASSES
            (backwards,) = generated(model, [request], backwards=True)
            assert miss(backwards.entropy, alone.entropy) > EFFECT * PASSES


@pytest.mark.parametrize("point", POINTS)
def test_taps_see_the_edited_states(model: Transformer, point: str) -> None:
    """All edits at a tap, in whole passes and where a decode step has memory for the state."""
    tap, last = Tap(1, point), len(IDS) - 1
    steerings = [
        Steering(direction(n), [1], point, mode, SCALE[mode])
        for n, mode in enumerate(("add", "clamp", "add_keep_norm"))
    ]

    def states(edits: EditTable | None) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(IDS))
        given = None if edits is None else edits.at
        capture = RowTaps([tap], rows, 48, dtype=model.dtype)
        buffer = TapBuffer([tap], torch.zeros(1, 1, 48))
        cache = model.new_cache(1, len(IDS))
        with torch.no_grad():
            model(torch.tensor([IDS]), sink=capture, edits=None if edits is None else edits.at)
            model(torch.tensor([IDS[:last]]), cache=cache, edits=given)
            model(torch.tensor([IDS[last:]]), cache=cache, sink=buffer, edits=given)
        return capture.states[:, 0], buffer.states[0, 0]

    bare, _ = states(None)
    stages = [bare.double()]  # after so many of the edits
    for steering in steerings:
        assert isinstance(steering.vector, Tensor)
        stages.append(edited(stages[-1], steering.vector.double(), steering.mode, steering.scale))
    whole, decoded = states(table(model, [steerings], [N_PROMPT]))
    expected = stages.pop()
    scale = float(expected.abs().max())
    assert miss(whole, expected) <= PASSES * scale
    assert miss(decoded, expected[last]) <= PASSES * scale
    for stage in stages:
        assert miss(stage[last], expected[last]) > EFFECT * PASSES * scale


def test_label_is_the_position_after_each_prompt(model: Transformer) -> None:
    """In a batch of unlike prompts, and it is none of the prompt's own."""

    def traces(rules: list[Any]) -> list[Any]:
        requests = requests_of(
            PROMPTS,
            max_new_tokens=3,
            stop_ids=(),
            lens=shardlens.LensSpec(),
            steering=[
                [] if rule is None else [Steering(V, mode="clamp", scale=3.0, positions=rule)]
                for rule in rules
            ],
        )
        results = shardlens.LanguageModel(model).generate(requests)
        return [result.trace for result in results]

    labels, bare = traces(["label"] * 3), traces([None] * 3)
    explicit = traces([[len(prompt)] for prompt in PROMPTS])
    for label, other, none, prompt in zip(labels, explicit, bare, PROMPTS, strict=True):
        n = len(prompt)
        assert torch.equal(label.entropy, other.entropy)
        assert torch.equal(label.entropy[:n], none.entropy[:n])
        assert miss(label.entropy[n], none.entropy[n]) > EFFECT * PASSES


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_for_each_tap(case: tuple[Any, Path], model: Transformer, mode: str) -> None:
    """As a list of edits with a tensor each; vectors at taps that are left out do nothing."""
    hf, _ = case
    vectors = vectors_at((2, "mlp_out"), (0, "mlp_out"), (1, "attn_norm"))

    def each(layers: tuple[int, ...]) -> list[Steering]:
        point = "mlp_out"
        return [
            Steering(vectors.at(Tap(layer, point)), (layer,), point, mode, SCALE[mode], "prompt")
            for layer in layers
        ]

    def together(layers: Any) -> Steering:
        return Steering(vectors, layers, "mlp_out", mode, SCALE[mode], "prompt")

    assert torch.equal(forced(model, [together("all")]), forced(model, each((0, 2))))
    assert torch.equal(forced(model, [together([-1])]), forced(model, each((2,))))
    expected = oracle(hf, each((0, 2)))
    assert miss(forced(model, [together("all")]), expected) <= PASSES
    other = vectors.at(Tap(2, "mlp_out"))  # where every tap gets the vector of one of them
    same = Steering(other, (0, 2), "mlp_out", mode, SCALE[mode], "prompt")
    assert miss(oracle(hf, [same]), expected) > EFFECT * PASSES
    assert miss(oracle(hf, []), expected) > EFFECT * PASSES


@pytest.mark.parametrize("mode", ["add", "clamp", "add_keep_norm"])
def test_unit_resid_norm(case: tuple[Any, Path], model: Transformer, mode: str) -> None:
    """The change, with clamp the component, is so many mean norms long, along the vector."""
    hf, _ = case
    vectors = vectors_at((0, "resid_mid"), (2, "resid_mid"))
    steering = Steering(vectors, mode=mode, scale=0.4, positions=5, unit="resid_norm")
    by_hand = []
    for layer, norm in ((0, 7.0), (2, 8.0)):
        v = vectors.at(Tap(layer, "resid_mid"))
        scale = 0.4 * norm if mode == "clamp" else 0.4 * norm / float(v.norm())
        by_hand.append(Steering(v, (layer,), "resid_mid", mode, scale, 5))
    expected = oracle(hf, by_hand)
    assert miss(forced(model, [steering]), expected) <= PASSES
    plain = Steering(vectors, mode=mode, scale=0.4, positions=5)
    assert miss(forced(model, [plain]), expected) > EFFECT * PASSES
    assert miss(oracle(hf, []), expected) > EFFECT * PASSES

"""Edits against transformers moved by hooks, one text at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import hf_model, save
from tolerances import EFFECT, PASSES
from torch import Tensor

import shardlens
from shardlens.kernels.edits import MODES
from shardlens.model import Transformer, load_weights
from shardlens.model.load import read_config
from shardlens.model.points import POINTS
from shardlens.model.steering import Steering
from shardlens.parallel.group import TensorParallel

IDS = torch.randint(3, 509, (19,), generator=torch.Generator().manual_seed(7)).tolist()
N_PROMPT = 11
POSITIONS: dict[Any, list[int]] = {
    "all": list(range(19)),
    "prompt": list(range(11)),
    "generated": list(range(11, 19)),
    "last_prompt": [10],
    5: list(range(5, 19)),
    (0, 3, 12): [0, 3, 12],
}
SCALE = {"add": 0.8, "ablate": 1.0, "clamp": 3.0, "add_keep_norm": 2.0}


def edited(x: Tensor, v: Tensor, mode: str, s: float) -> Tensor:
    """The definitions of kernels/edits.py, written out."""
    u = v / v.norm()
    along = (x @ u)[..., None]
    if mode == "add":
        return x + s * v
    if mode == "ablate":
        return x - s * along * u
    if mode == "clamp":
        return x + (s - along) * u
    moved = x + s * v
    return moved * x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module", params=["llama-mha", "qwen3"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = hf_model(request.param, num_attention_heads=4, num_key_value_heads=4)
    return model.double(), save(model.float(), tmp_path_factory.mktemp(request.param))


def load(directory: Path, parallel: TensorParallel) -> Transformer:
    model = Transformer(read_config(directory), parallel=parallel)
    load_weights(model, directory)
    return model.eval().requires_grad_(False)


def hook_for(layer: Any, point: str, change: Callable[[Tensor], Tensor]) -> Callable[[], list[Any]]:
    """Registers hooks on one decoder layer of transformers that change the state at `point`."""
    moved: dict[str, Tensor] = {}

    def on_input(module: Any, args: Any, kwargs: Any) -> Any:
        return ((change(args[0]), *args[1:]), kwargs)

    def on_output(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def mid_in(module: Any, args: Any) -> Any:  # the norm reads it, the residual must follow
        moved["by"] = change(args[0]) - args[0]
        return (args[0] + moved["by"],)

    def mid_out(module: Any, args: Any, output: Any) -> Any:
        return output + moved["by"]

    return {
        "resid_pre": lambda: [layer.register_forward_pre_hook(on_input, with_kwargs=True)],
        "attn_norm": lambda: [layer.input_layernorm.register_forward_hook(on_output)],
        "attn_out": lambda: [layer.self_attn.register_forward_hook(on_output)],
        "resid_mid": lambda: [
            layer.post_attention_layernorm.register_forward_pre_hook(mid_in),
            layer.register_forward_hook(mid_out),
        ],
        "mlp_norm": lambda: [layer.post_attention_layernorm.register_forward_hook(on_output)],
        "mlp_out": lambda: [layer.mlp.register_forward_hook(on_output)],
        "resid_post": lambda: [layer.register_forward_hook(on_output)],
    }[point]


@torch.no_grad()
def oracle(hf: Any, steering: Steering | None, positions: list[int]) -> Tensor:
    """Log-probs [T, V] of the whole text in float64."""
    hf.double()
    handles: list[Any] = []
    if steering is not None:
        inside = torch.zeros(len(IDS), dtype=torch.bool)
        inside[positions] = True
        v = steering.vector.double()

        def change(x: Tensor) -> Tensor:
            new = edited(x, v, steering.mode, steering.scale)
            return torch.where(inside[: x.shape[1], None], new, x)

        assert not isinstance(steering.layers, str)
        for number in steering.layers:
            handles += hook_for(hf.model.layers[number], steering.point, change)()
    try:
        return hf(torch.tensor([IDS]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


def forced(model: Transformer, steering: list[Steering]) -> Tensor:
    """Log-probs [T, V] of the text: N_PROMPT tokens in chunks, the rest decoded with a cache."""
    from shardlens.model.steering import EditTable

    cache = model.new_cache(1, len(IDS))
    edits = None
    if steering:
        edits = EditTable.of(
            [steering], [N_PROMPT], len(IDS), model.config, model.dtype, model.device
        )
    ids = torch.tensor([IDS])
    parts = [ids[:, :4], ids[:, 4:N_PROMPT], *ids[:, N_PROMPT:].split(1, dim=1)]
    with torch.no_grad():
        hidden = torch.cat([model(part, cache=cache, edits=edits) for part in parts], 1)
        logits = model.norm(hidden)[0] @ model.head.weight.T
    return logits.double().log_softmax(-1)


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
    expected = oracle(hf, steering, POSITIONS[rule])
    first = POSITIONS[rule][0]
    assert (forced(model, [steering]) - expected).abs().max() <= PASSES
    bare = oracle(hf, None, [])
    assert (bare[:first] - expected[:first]).abs().max() <= PASSES if first else True
    assert (bare[first:] - expected[first:]).abs().max() > EFFECT * PASSES


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("point", POINTS)
def test_on_ranks(case: tuple[Any, Path], point: str, ranks: int, run_ranks: Any) -> None:
    """As read by the lens of the model's own output, under edits of a batch's second request."""
    hf, directory = case
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    steering = Steering(vector, (1,), point, "add", 0.8, 5)
    expected = oracle(hf, steering, POSITIONS[5])

    def body(parallel: TensorParallel) -> None:
        results = shardlens.generate(
            load(directory, parallel),
            [IDS[:7], IDS],
            max_new_tokens=0,
            lens=shardlens.LensSpec(layers=[-1], top_k=5),
            steering=[[], [steering]],
        )
        trace = results[1].trace  # type: ignore[index]
        assert trace is not None
        told = expected.gather(-1, trace.token_ids[:, 0])
        assert (trace.logprobs[:, 0] - told).abs().max() <= PASSES
        unmoved = results[0].trace  # type: ignore[index]
        bare = oracle(hf, None, []) if parallel.rank == 0 else None
        if bare is not None:
            told = bare[:7].gather(-1, unmoved.token_ids[:, 0])
            assert (unmoved.logprobs[:, 0] - told).abs().max() <= PASSES

    run_ranks(ranks, body)


def test_one_place_has_two_names(case: tuple[Any, Path]) -> None:
    model = load(case[1], TensorParallel.single())
    make = partial(Steering, torch.randn(48), mode="add")
    post, pre = make(layers=[0], point="resid_post"), make(layers=[1], point="resid_pre")
    assert torch.equal(forced(model, [post]), forced(model, [pre]))
    assert not torch.equal(forced(model, [post]), forced(model, []))


def test_several_edits_of_one_request(case: tuple[Any, Path]) -> None:
    """Apart in place or position they act together; where two meet, that is an error."""
    model = load(case[1], TensorParallel.single())
    v = torch.randn(48)
    whole = Steering(v, [1], "mlp_norm")
    halves = [Steering(v, [1], "mlp_norm", positions=rule) for rule in ("prompt", "generated")]
    assert torch.equal(forced(model, [whole]), forced(model, halves))
    with pytest.raises(ValueError, match="layer 1, mlp_norm, position 5"):
        forced(model, [halves[0], Steering(v, "all", "mlp_norm", positions=5)])


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(vector=torch.zeros(2, 48)), "dim"),
        (dict(vector=torch.full((48,), float("nan"))), "finite"),
        (dict(scale=float("inf")), "finite"),
        (dict(scale=float("nan")), "not a number"),
        (dict(point="resid"), "resid"),
        (dict(mode="subtract"), "subtract"),
        (dict(positions="label"), "label"),
        (dict(vector=torch.zeros(47)), "47"),
        (dict(layers=[3]), "layer 3"),
    ],
)
def test_refused(case: tuple[Any, Path], options: dict[str, Any], names: str) -> None:
    model = load(case[1], TensorParallel.single())
    with pytest.raises(ValueError, match=names):
        steering = Steering(**{"vector": torch.zeros(48), **options})
        shardlens.generate(model, IDS, steering=[steering])

"""The lens against full float64 logits, for every rank count and block size."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ExactLens, exact_lens, hf_model, save
from tolerances import CHUNKING, EFFECT, LENS, PASSES
from torch import Tensor

import shardlens
from shardlens.engine import lens_rows as lens_module
from shardlens.kernels import head_stats_reference
from shardlens.model import POINTS, RowTaps, Tap, load_weights, parse_layers, read_config
from shardlens.parallel import TensorParallel
from shardlens.parallel import head_reduce as head_module

TOKEN_IDS = torch.randint(3, 509, (45,), generator=torch.Generator().manual_seed(3)).tolist()
TOP_K = 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 heads and 12 KV heads, so that 1, 2, 3 and 4 ranks can share them; 509 ids."""
    torch.manual_seed(0)
    model = hf_model("llama-mha", num_attention_heads=12, num_key_value_heads=12)
    # Twins: ids whose logits tie in every row, on the same rank and across ranks.
    head = model.lm_head.weight.data
    head[100], head[400], head[101] = head[7], head[7], head[7]
    return save(model, tmp_path_factory.mktemp("lens"))


def load(checkpoint: Path, parallel: TensorParallel) -> shardlens.Transformer:
    model = shardlens.Transformer(read_config(checkpoint), parallel=parallel)
    load_weights(model, checkpoint)
    return model


@torch.no_grad()
def oracle(model: shardlens.Transformer, checkpoint: Path) -> ExactLens:
    """Exact lens of every point of every layer, of the states that this model computes."""
    taps = tuple(Tap(layer, point) for layer in range(model.config.n_layers) for point in POINTS)
    capture = RowTaps(taps, torch.arange(len(TOKEN_IDS)), model.config.d, dtype=model.dtype)
    cache = model.new_cache(1, len(TOKEN_IDS))
    model(torch.tensor([TOKEN_IDS]), cache=cache, sink=capture)
    full_head = load(checkpoint, TensorParallel.single()).head.weight
    return exact_lens(model.norm(capture.states), full_head)


def traced(checkpoint: Path, parallel: TensorParallel, **options: Any) -> shardlens.Trace:
    return shardlens.LanguageModel(load(checkpoint, parallel)).lens(
        TOKEN_IDS, points=POINTS, top_k=TOP_K, **options
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_against_float64(checkpoint: Path, ranks: int, run_ranks: Any) -> None:
    targets = torch.tensor([*TOKEN_IDS[1:], 0])

    def body(parallel: TensorParallel) -> None:
        model = load(checkpoint, parallel)
        trace = shardlens.LanguageModel(model).lens(TOKEN_IDS, points=POINTS, top_k=TOP_K)
        exact = oracle(model, checkpoint)
        assert torch.equal(trace.token_ids, exact.order[..., :TOP_K])
        expected = exact.logprobs.gather(-1, trace.token_ids)
        assert (trace.logprobs - expected).abs().max() <= LENS
        assert (trace.entropy - exact.entropy).abs().max() <= LENS
        assert (trace.kl_to_final - exact.kl_to_final).abs().max() <= LENS
        assert trace.targets.tolist() == [*TOKEN_IDS[1:], -1]
        logprob_error = trace.target_logprob - exact.target_logprob(targets)
        assert logprob_error[:-1].abs().max() <= LENS
        assert torch.equal(trace.target_rank[:-1], exact.rank(targets)[:-1])
        assert trace.target_logprob[-1].isnan().all() and (trace.target_rank[-1] == -1).all()

    run_ranks(ranks, body)


def test_the_bugs_it_must_catch(checkpoint: Path) -> None:
    """Renormalising over k, skipping the final norm, and KL the other way round all show."""
    model = load(checkpoint, TensorParallel.single())
    exact = oracle(model, checkpoint)
    best = exact.logprobs.gather(-1, exact.order[..., :TOP_K])
    assert (best.exp().sum(-1) < 1 - EFFECT * LENS).all()
    assert (best - best.log_softmax(-1)).abs().max() > EFFECT * LENS
    reverse = (exact.logprobs.exp() * (exact.logprobs - exact.logprobs[:, -1:])).sum(-1)
    assert (reverse - exact.kl_to_final).abs().max() > EFFECT * LENS
    states = torch.randn(2, 3, model.config.d)
    with torch.no_grad():
        bare = exact_lens(states, model.head.weight).entropy
        normed = exact_lens(model.norm(states), model.head.weight).entropy
    assert (bare - normed).abs().max() > EFFECT * LENS


def test_last_layer_is_the_model(checkpoint: Path) -> None:
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logprobs = hf(torch.tensor([TOKEN_IDS])).logits[0].double().log_softmax(-1)
    trace = traced(checkpoint, TensorParallel.single())
    last = trace.taps.index(Tap(2, "resid_post"))
    assert (
        trace.logprobs[:, last] - logprobs.gather(-1, trace.token_ids[:, last])
    ).abs().max() <= LENS
    assert (trace.kl_to_final[:, last] == 0).all()


@pytest.mark.parametrize(
    "vocab_block, row_block, decode_block", [(64, 21, 3), (100, 1000, 45), (7, 1, 64)]
)
def test_block_sizes_do_not_matter(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    vocab_block: int,
    row_block: int,
    decode_block: int,
) -> None:
    usual = traced(checkpoint, TensorParallel.single(), targets=7)
    monkeypatch.setattr(lens_module, "DECODED_POSITIONS", decode_block)
    blocked = partial(head_stats_reference, vocab_block=vocab_block, row_block=row_block)
    monkeypatch.setattr(head_module, "head_stats", blocked)
    other = traced(checkpoint, TensorParallel.single(), targets=7)
    for name, value in vars(usual).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert (value - getattr(other, name)).abs().max() <= CHUNKING, name
        else:
            again = getattr(other, name)
            assert torch.equal(value, again) if isinstance(value, Tensor) else value == again, name


def test_ties_go_to_the_lower_id(checkpoint: Path, run_ranks: Any) -> None:
    """Ids 7, 100, 101 and 400 tie everywhere; 400 lies on another rank at 2 and 4 ranks."""
    for ranks in (1, 2, 4):
        for twin, ahead in ((7, 0), (100, 1), (101, 2), (400, 3)):
            trace = run_ranks(ranks, partial(traced, checkpoint, targets=twin))[0]
            first = run_ranks(ranks, partial(traced, checkpoint, targets=7))[0]
            assert torch.equal(trace.target_rank, first.target_rank + ahead)


def test_subset_equals_whole(checkpoint: Path) -> None:
    """Fewer points and layers give the same numbers, though the final layer is not among them."""
    model = load(checkpoint, TensorParallel.single())
    whole = shardlens.LanguageModel(model).lens(TOKEN_IDS, points=POINTS, top_k=TOP_K)
    part = shardlens.LanguageModel(model).lens(
        TOKEN_IDS, points=("mlp_out", "resid_pre"), layers="0,-2", top_k=TOP_K
    )
    assert part.taps == (
        Tap(0, "resid_pre"),
        Tap(0, "mlp_out"),
        Tap(1, "resid_pre"),
        Tap(1, "mlp_out"),
    )
    index = [whole.taps.index(tap) for tap in part.taps]
    assert torch.equal(part.token_ids, whole.token_ids[:, index])
    assert (part.kl_to_final - whole.kl_to_final[:, index]).abs().max() <= CHUNKING
    assert part.kl_to_final.min() > EFFECT * LENS


def test_positions(checkpoint: Path) -> None:
    model = load(checkpoint, TensorParallel.single())
    prompt, new = TOKEN_IDS[:6], 5

    def positions_of(positions: str) -> list[int]:
        spec = shardlens.LensSpec(positions=positions)
        result = shardlens.LanguageModel(model).generate(
            prompt, max_new_tokens=new, lens=spec, stop_ids=()
        )
        assert result.trace is not None
        assert result.trace.input_ids == [*prompt, *result.token_ids]
        following = [result.trace.input_ids[index + 1] for index in result.trace.positions.tolist()]
        assert result.trace.targets.tolist() == following
        return result.trace.positions.tolist()

    assert positions_of("all") == list(range(10))
    assert positions_of("prompt") == list(range(6))
    assert positions_of("generated") == list(range(5, 10))
    assert positions_of("last") == [5]


@pytest.mark.parametrize("ranks", [1, 2])
def test_generation_lens_equals_lens_of_the_text(
    checkpoint: Path, ranks: int, run_ranks: Any
) -> None:
    """A batch of prompts of different lengths, read while it runs, against one text at a time."""
    prompts = [TOKEN_IDS[:4], TOKEN_IDS[10:31], TOKEN_IDS[5:6]]

    def body(parallel: TensorParallel) -> None:
        model = load(checkpoint, parallel)
        spec = shardlens.LensSpec(points=("attn_out", "resid_post"), top_k=TOP_K)
        results = shardlens.LanguageModel(model).generate(
            prompts, max_new_tokens=6, lens=spec, stop_ids=()
        )
        for prompt, result in zip(prompts, results, strict=True):
            alone = shardlens.LanguageModel(model).lens(
                [*prompt, *result.token_ids], points=spec.points, top_k=TOP_K
            )
            assert result.trace is not None
            n = len(result.trace.positions)
            assert n == len(prompt) + 5
            assert torch.equal(result.trace.token_ids, alone.token_ids[:n])
            assert torch.equal(result.trace.target_rank, alone.target_rank[:n])
            assert (result.trace.logprobs - alone.logprobs[:n]).abs().max() <= PASSES
            assert (result.trace.kl_to_final - alone.kl_to_final[:n]).abs().max() <= PASSES
            # a trace that is off by one position would show
            moved = alone.logprobs[1:n] - result.trace.logprobs[: n - 1]
            assert moved.numel() == 0 or moved.abs().max() > EFFECT * PASSES

    run_ranks(ranks, body)


def test_captured_states_are_copies(checkpoint: Path) -> None:
    """A view of one position would keep the activations of the whole pass alive."""
    model = load(checkpoint, TensorParallel.single())
    capture = RowTaps((Tap(1, "resid_mid"),), torch.tensor([44]), model.config.d, dtype=model.dtype)
    model(torch.tensor([TOKEN_IDS]), sink=capture)
    assert capture.states.untyped_storage().nbytes() == model.config.d * 4


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("all", [0, 1, 2, 3]),
        ("0-2", [0, 1, 2]),
        ("-1", [3]),
        ("3,0", [0, 3]),
        ("1--1", [1, 2, 3]),
        ([-4, 2], [0, 2]),
        (range(2), [0, 1]),
    ],
)
def test_layers(layers: Any, expected: list[int]) -> None:
    assert parse_layers(layers, 4) == expected


@pytest.mark.parametrize(
    "layers", ["3,0,0", [1, 1], "99", "0-99", "98-99", "-5", "a", "", "2-1", "0-4", [4], "1,,2", []]
)
def test_layers_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layer"):
        parse_layers(layers, 4)


@pytest.mark.parametrize(
    "change, names",
    [
        (dict(points=("resid_pots",)), "resid_pots"),
        (dict(points=()), "point"),
        (dict(top_k=0), "0"),
        (dict(top_k=510), "510"),
        (dict(targets=509), "509"),
        (dict(positions="some"), "some"),
    ],
)
def test_spec_refused(checkpoint: Path, change: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        dataclasses.replace(shardlens.LensSpec(), **change).check(read_config(checkpoint))

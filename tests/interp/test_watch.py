"""States copied from other libraries' models while they run: right, bounded, and nothing left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from others import IDS, is_clean, llama, qwen3
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaForCausalLM

from shardlens import load
from shardlens.interp import Unembedding, Watch, watch
from shardlens.model import DEMO, POINTS, Tap


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [llama, qwen3])
def test_all_points_of_transformers(make: type[nn.Module]) -> None:
    model = make()
    with torch.no_grad():
        before = model(IDS).logits
        with watch(model, points=POINTS) as watching:
            during = model(IDS).logits
        assert is_clean(model)
        hidden = model(IDS, output_hidden_states=True).hidden_states  # leaves hooks of its own
    states = watching.states
    for layer in range(3):
        at = {point: states[Tap(layer, point)] for point in POINTS}
        block = model.model.layers[layer]
        assert torch.equal(at["resid_pre"], hidden[layer])
        assert torch.equal(at["attn_norm"], block.input_layernorm(at["resid_pre"]))
        assert torch.equal(at["resid_mid"], at["resid_pre"] + at["attn_out"])
        assert torch.equal(at["mlp_norm"], block.post_attention_layernorm(at["resid_mid"]))
        assert torch.equal(at["mlp_out"], block.mlp(at["mlp_norm"]))
        assert torch.equal(at["resid_post"], at["resid_mid"] + at["mlp_out"])
    assert watching.stacked().shape == (2, 7, 21, 32)
    assert torch.equal(before, during) and torch.equal(model(IDS).logits, before)


def test_a_transformer_agrees_with_transformers() -> None:
    lm = load("demo", device="cpu", dtype=torch.float32)
    theirs = LlamaForCausalLM.from_pretrained(str(DEMO), dtype=torch.float32)
    ids = torch.tensor([lm.tokenizer.encode("The capital of Norvia is")])
    with torch.no_grad():
        with watch(lm.model, points=POINTS) as ours:
            lm.model(ids)
        with watch(theirs, points=POINTS) as other:
            theirs(ids)
    assert ours.taps == other.taps
    torch.testing.assert_close(ours.stacked(), other.stacked(), atol=2e-5, rtol=1e-5)
    assert is_clean(lm.model)


def test_rows_go_to_a_lens() -> None:
    model = llama()
    with torch.no_grad(), watch(model, layers=[0, -1], positions=[2, -1]) as watching:
        logits = model(IDS).logits
    read = Unembedding.of(model).read(watching.stacked(), top_k=3, kl_to_last=True)
    best = logits[:, [2, -1]].log_softmax(-1).topk(3, -1)
    assert torch.equal(read.token_ids[:, :, 1], best.indices)
    torch.testing.assert_close(read.logprobs[:, :, 1], best.values, atol=1e-5, rtol=0)
    assert (read.kl_to_final[:, :, 1].abs() < 1e-6).all() and (read.kl_to_final[:, :, 0] > 0).all()


def test_nothing_is_left_after_an_error() -> None:
    model = llama()
    before = model(IDS).logits
    with pytest.raises(RuntimeError, match="broken"), watch(model) as watching:
        model(IDS)
        held = weakref.ref(watching.states[Tap(0, "resid_post")])
        raise RuntimeError("broken")
    assert is_clean(model) and torch.equal(model(IDS).logits, before)
    del watching
    gc.collect()
    assert held() is None


def test_a_pass_that_fails_leaves_no_states_of_the_one_before() -> None:
    model = llama()
    with watch(model) as watching:
        model(IDS)
        with pytest.raises(IndexError):
            model(IDS + 1000)
        model(IDS)
        assert len(watching.states) == 3


def test_activation_checkpointing_copies_once() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable()
    with watch(model) as watching:
        loss = model(IDS, labels=IDS, use_cache=False).loss
        first = watching.states
        loss.backward()
        again = watching.states
    assert all(again[tap] is first[tap] for tap in first)
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model(fullgraph: bool) -> None:
    model, counter = llama().eval(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
    with torch.no_grad():
        with watch(model, points=POINTS) as eager:
            model(IDS)
        with watch(compiled, points=POINTS) as watching:
            for _ in range(4):
                compiled(IDS)
            assert counter.frame_count == 1
        assert torch.equal(watching.stacked(), eager.stacked())
        compiled(IDS)
        assert counter.frame_count == 2  # once more, without hooks
        with watch(compiled) as late:
            compiled(IDS)
        with pytest.raises(ValueError, match="compiled before the watch was made"):
            _ = late.states
        assert counter.frame_count == 2


@pytest.mark.slow
def test_a_watch_that_is_opened_and_closed_under_a_compiler() -> None:
    model, counter = llama().eval(), CompileCounter()
    watching = Watch(model, points="mlp_out")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for _ in range(4):
            compiled(IDS)
            with watching:
                compiled(IDS)
            assert len(watching.states) == 3
    assert counter.frame_count == 2
    watching.close()
    assert is_clean(model)


def test_compiled_blocks_are_watched_at_any_time() -> None:
    model, counter = llama().eval(), CompileCounter()
    for block in model.model.layers:
        block.compile(backend=counter)
    calls = [block._compiled_call_impl for block in model.model.layers]
    with torch.no_grad():
        model(IDS)
        frames = counter.frame_count
        for _ in range(3):
            with watch(model, points=("resid_pre", "resid_post")) as watching:
                model(IDS)
        uncompiled = llama().eval()
        with watch(uncompiled) as eager:
            uncompiled(IDS)
    assert counter.frame_count == frames
    assert torch.equal(watching.states[Tap(1, "resid_post")], eager.states[Tap(1, "resid_post")])
    assert [block._compiled_call_impl for block in model.model.layers] == calls


def test_wrapped_models_are_looked_through() -> None:
    model = llama()
    wrapped = nn.Module()
    wrapped.module = model
    with watch(wrapped, layers=1) as watching:
        model(IDS)
    assert list(watching.states) == [Tap(1, "resid_post")]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"points": "resid"}, "point"),
        ({"layers": 3}, "layer 3 does not exist"),
        ({"positions": "first"}, "give all, last, or indices"),
        ({"positions": 1.5}, "positions"),
    ],
)
def test_what_is_refused(options: dict[str, object], says: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=says), watch(model, **options):  # type: ignore[arg-type]
        pass
    assert is_clean(model)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"most_bytes": 5000}, "more than 5,000 bytes at resid_post of layer 2"),
        ({"positions": [7]}, "position 7 is outside a pass of 7 tokens"),
    ],
)
def test_passes_that_are_refused(options: dict[str, object], says: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=says), watch(model, **options):  # type: ignore[arg-type]
        model(IDS)
    assert is_clean(model)


def test_an_unknown_decoder_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="Odd is no decoder that is known here"), watch(Odd()):
        pass

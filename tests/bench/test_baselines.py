"""The rivals of `bench end-to-end`: on our weights, with our answers, and at their own cost."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracles import FAMILIES, SMALL
from tolerances import EFFECT, LOGITS_RELATIVE, PASSES
from torch import Tensor

import shardlens
from shardlens.bench import baselines, models
from shardlens.bench.baselines import CachedLens, FaithfulBaseline, PaperMethod, RunOutput
from shardlens.bench.models import as_transformers
from shardlens.model import ModelConfig, Transformer, hf_state_dict, init_weights

PROMPT = [3, 77, 405, 11, 260, 31, 8, 500, 94]
N_TOKENS, TOP_K, LAYERS = 6, 5, 3
RIVALS = {
    "baseline": FaithfulBaseline,
    "cached": CachedLens,
    "paper": PaperMethod,
    "paper by layer": lambda hf: PaperMethod(hf, by_layer=True),
}


def small_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    """Random, norms and biases too, so that they count."""
    family, options = FAMILIES[name]
    content = SMALL | options | {"architectures": [f"{family}ForCausalLM"]} | changes
    model = Transformer(ModelConfig.from_hf(content), dtype=dtype)
    init_weights(model, std=0.3)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=["llama3-rope", "qwen2-tied", "qwen3"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return small_model(request.param)


@pytest.fixture(scope="module")
def hf(model: Transformer) -> Any:
    return as_transformers(model)


@contextmanager
def calls(*modules: Any) -> Iterator[list[Tensor]]:
    """The outputs of every call of these modules."""
    outputs: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, i, output: outputs.append(output)) for m in modules]
    yield outputs
    for hook in hooks:
        hook.remove()


def n_rows(output: Tensor) -> int:
    return output[..., 0].numel()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_parameters_are_views_of_ours(name: str) -> None:
    ours = small_model(name)
    theirs = as_transformers(ours)
    storages = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert {p.untyped_storage().data_ptr() for p in theirs.parameters()} == storages
    ends = 0
    for key, tensor in hf_state_dict(ours).items():
        parameter = theirs.get_parameter(key)
        assert parameter.data_ptr() == tensor.data_ptr() and parameter.shape == tensor.shape, key
        ends += parameter.numel()
    assert ends == sum(p.numel() for p in ours.parameters())
    assert theirs.config._attn_implementation == "sdpa" and not theirs.training


@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.inference_mode()
def test_logits_are_ours(name: str) -> None:
    ours = small_model(name)
    ids = torch.randint(3, 509, (2, 100), generator=torch.Generator().manual_seed(2))
    logits = ours.norm(ours(ids)) @ ours.head.valid_weight.T
    theirs = as_transformers(ours)
    allowed = LOGITS_RELATIVE * logits.abs().max()
    assert (theirs(ids).logits - logits).abs().max() <= allowed
    # not for want of a difference: other frequencies show
    theirs.model.rotary_emb.inv_freq.mul_(0.9)
    assert (theirs(ids).logits - logits).abs().max() > EFFECT * allowed


def test_another_dtype_is_a_copy() -> None:
    ours = small_model("qwen2-tied", torch.bfloat16)
    theirs = as_transformers(ours, torch.float32)
    assert theirs.dtype == theirs.config.dtype == torch.float32
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert torch.equal(theirs.model.norm.weight, ours.norm.weight.float())
    assert theirs.model.norm.weight.data_ptr() != ours.norm.weight.data_ptr()
    half = as_transformers(ours)
    assert half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_what_transformers_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = hf_state_dict(small_model("qwen2"))
    del lacking["model.layers.1.self_attn.k_proj.bias"]
    monkeypatch.setattr(models, "hf_state_dict", lambda model: lacking)
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM of transformers .*1.*k_proj.bias$"):
        as_transformers(small_model("qwen2"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs transformers: pip install"):
        as_transformers(small_model("qwen2"))


def check_against_ours(model: Transformer, output: RunOutput, top_k: int) -> None:
    n_tokens = len(output.token_ids)
    spec = shardlens.LensSpec(positions="generated", targets=None, top_k=top_k)
    lm = shardlens.LanguageModel(model)
    ours = lm.generate(PROMPT, max_new_tokens=n_tokens, lens=spec, stop_ids=())
    assert ours.trace is not None and ours.trace.logprobs is not None
    assert output.token_ids == ours.token_ids
    assert output.lens_ids is not None and output.lens_logprobs is not None
    assert output.lens_ids.dtype == torch.int64 and output.lens_logprobs.dtype == torch.float32
    assert torch.equal(output.lens_ids, ours.trace.token_ids)
    assert output.lens_ids[:, -1, 0].tolist() == output.token_ids
    theirs, expected = output.lens_logprobs, ours.trace.logprobs
    assert (theirs - expected).abs().max() <= PASSES
    # positions and layers differ, so that taking one for the other would show
    assert (theirs[1:] - expected[:-1]).abs().amax((1, 2)).min() > EFFECT * PASSES
    assert (theirs[:, 1:] - expected[:, :-1]).abs().amax((0, 2)).min() > EFFECT * PASSES


@pytest.mark.parametrize("rival", sorted(RIVALS))
def test_answers_are_ours(model: Transformer, hf: Any, rival: str) -> None:
    tokens: list[int] = []
    output = RIVALS[rival](hf).run(PROMPT, N_TOKENS, TOP_K, tokens.append)
    assert tokens == output.token_ids and len(tokens) == N_TOKENS
    check_against_ours(model, output, TOP_K)
    single = RIVALS[rival](hf).run(PROMPT, 1, 1)
    assert single.lens_ids is not None and single.lens_ids.shape == (1, LAYERS, 1)
    assert single.lens_ids[0, -1, 0] == tokens[0]
    for layer in hf.model.layers:  # the next rival runs on the same model
        assert not layer._forward_hooks and not layer.self_attn._forward_hooks


@torch.inference_mode()
def test_the_last_layer_is_normed_once(hf: Any) -> None:
    """Reading transformers' `hidden_states` for it would norm twice, which is not the same."""
    output = CachedLens(hf).run(PROMPT, 1, TOP_K)
    assert output.lens_ids is not None and output.lens_logprobs is not None
    found = hf(torch.tensor([PROMPT]), output_hidden_states=True)
    twice = hf.lm_head(hf.model.norm(found.hidden_states[-1][:, -1])).log_softmax(-1)
    once = found.logits[:, -1].log_softmax(-1)
    read = output.lens_logprobs[0, -1]
    assert (read - once[0, output.lens_ids[0, -1]]).abs().max() <= PASSES
    assert (read - twice[0, output.lens_ids[0, -1]]).abs().max() > EFFECT * PASSES


def test_cost_of_the_baseline(hf: Any) -> None:
    """8L + 2 head products per token over all positions, the MLP twice, no cache, logits kept."""
    alive: list[int] = []
    logits: list[weakref.ref[Tensor]] = []
    hook = hf.lm_head.register_forward_hook(lambda m, i, out: logits.append(weakref.ref(out)))

    def on_token(token: int) -> None:
        alive.append(sum(made() is not None for made in logits))

    mlps, lengths = [layer.mlp for layer in hf.model.layers], (9, 10, 11)
    with calls(*mlps) as through_mlp, calls(hf.model.layers[0].self_attn.k_proj) as keys:
        FaithfulBaseline(hf).run(PROMPT, 3, TOP_K, on_token)
    hook.remove()
    with calls(hf.lm_head) as products:
        FaithfulBaseline(hf).run(PROMPT, 3, TOP_K)
    per_token = 8 * LAYERS + 2
    assert list(map(n_rows, products)) == [t for t in lengths for _ in range(per_token)]
    assert list(map(n_rows, through_mlp)) == [t for t in lengths for _ in range(4 * LAYERS)]
    assert list(map(n_rows, keys)) == [t for t in lengths for _ in range(2)]
    assert alive == [4 * LAYERS + 1] * 3
    assert not any(made() is not None for made in logits)


def test_cost_of_the_cached_rivals(hf: Any) -> None:
    """One new position a step; the head over L rows at each, or over all of them at the end."""
    sampled = [1] * N_TOKENS
    expected = {
        "cached": [1, LAYERS] * N_TOKENS,
        "paper": [*sampled, N_TOKENS * LAYERS],
        "paper by layer": [*sampled, *[N_TOKENS] * LAYERS],
    }
    for rival, rows in expected.items():
        with calls(hf.lm_head) as products, calls(hf.model.layers[0].self_attn.k_proj) as keys:
            RIVALS[rival](hf).run(PROMPT, N_TOKENS, TOP_K)
        assert list(map(n_rows, products)) == rows, rival
        assert list(map(n_rows, keys)) == [len(PROMPT), *[1] * (N_TOKENS - 1)], rival


def test_half_dtype() -> None:
    """All rivals read what the model in its half dtype says, as float32."""
    half = as_transformers(small_model("llama-gqa-tied", torch.bfloat16))
    with torch.inference_mode():
        logits = half(torch.tensor([PROMPT])).logits[0, -1].float()
    said, rounding = logits.log_softmax(-1), logits.abs().max() * torch.finfo(torch.bfloat16).eps
    for name, rival in RIVALS.items():
        output = rival(half).run(PROMPT, 1, TOP_K)
        assert output.lens_ids is not None and output.lens_logprobs is not None
        assert output.lens_logprobs.dtype == torch.float32
        read, ids = output.lens_logprobs[0, -1], output.lens_ids[0, -1]
        assert (read - said[ids]).abs().max() <= rounding, name


def test_logits_that_do_not_fit_are_refused(hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = baselines.free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    rows = N_TOKENS * LAYERS
    monkeypatch.setattr(baselines, "free_bytes", lambda device: rows * 509 * 4)
    PaperMethod(hf).run(PROMPT, N_TOKENS, TOP_K)
    with pytest.raises(ValueError, match=r"paper's method's logits of 21 rows take .* fewer"):
        PaperMethod(hf).run(PROMPT, N_TOKENS + 1, TOP_K)
    PaperMethod(hf, by_layer=True).run(PROMPT, N_TOKENS + 1, TOP_K)
    with pytest.raises(ValueError, match="baseline's logits of 14 positions"):
        FaithfulBaseline(hf).run(PROMPT, N_TOKENS, TOP_K)

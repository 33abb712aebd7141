"""Rotary frequencies and their scaling, against transformers, inside and beyond a context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from configs import LLAMA, MISTRAL, QWEN2, QWEN3, ROPES, YARN, theirs
from oracles import hf_model

from shardlens.model import ModelConfig, Transformer, inverse_frequencies, read_config


@pytest.mark.parametrize("family", [LLAMA, QWEN2, QWEN3, MISTRAL | {"sliding_window": None}])
@pytest.mark.parametrize("name", ROPES)
def test_rope_is_that_of_transformers(name: str, family: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = family | ROPES[name]
    config = ModelConfig.from_hf(raw)
    oracle = LlamaRotaryEmbedding(theirs(raw))
    torch.testing.assert_close(inverse_frequencies(config), oracle.inv_freq, rtol=2e-6, atol=0)
    assert config.rope_scaling.attention_factor == pytest.approx(oracle.attention_scaling)


def test_contexts_that_scaling_makes() -> None:
    assert ModelConfig.from_hf(LLAMA | dict(rope_scaling=YARN)).context == 128
    longer = YARN | dict(factor=8.0)
    assert ModelConfig.from_hf(LLAMA | dict(rope_scaling=longer)).context == 256
    dynamic = dict(rope_type="dynamic", factor=4.0)
    assert ModelConfig.from_hf(LLAMA | dict(rope_scaling=dynamic)).context == 512
    linear = dict(rope_type="linear", factor=4.0)
    assert ModelConfig.from_hf(LLAMA | dict(rope_scaling=linear)).context == 128


@torch.no_grad()
@pytest.mark.parametrize("n_prompt", [9, 24, 31])
def test_dynamic_rope_inside_and_beyond_its_context(n_prompt: int, tmp_path: Path) -> None:
    """Prompts of 9 to 31 tokens and texts of 45, where the original context is 24."""
    from shardlens import LanguageModel, Sampling
    from shardlens.model import load_weights

    options = dict(
        rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4),
        max_position_embeddings=24,
        head_dim=16,
    )
    ids = torch.randint(3, 509, (1, n_prompt), generator=torch.Generator().manual_seed(3))
    hf = hf_model("llama-mha", **options)
    hf.save_pretrained(tmp_path)
    model = Transformer(read_config(tmp_path))
    load_weights(model, tmp_path)
    logits = model.norm(model(ids)) @ model.head.valid_weight.T
    expected = hf(ids).logits
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-4)
    greedy = hf.generate(ids, max_new_tokens=45 - n_prompt, do_sample=False, eos_token_id=None)
    lm = LanguageModel(model.requires_grad_(False))
    for chunk in (7, 512):
        result = lm._engine.run(
            [_request(ids[0].tolist(), 45 - n_prompt, Sampling())], prefill_chunk=chunk
        )[0]
        assert result.tokens == greedy[0, n_prompt:].tolist()
    plain = hf_model("llama-mha", **options | dict(rope_parameters=dict(rope_type="default")))
    plain.load_state_dict(hf.state_dict())
    if n_prompt > 24:
        assert (plain(ids).logits - expected).abs().max() > 0.01


def _request(prompt: list[int], max_new_tokens: int, sampling: Any) -> Any:
    from shardlens import Request

    return Request(prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=())

"""Small configs of every family as config.json has them, and transformers' reading of them."""

from __future__ import annotations

import json
from typing import Any

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=509,
    hidden_size=64,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
QWEN2 = LLAMA | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
QWEN3 = LLAMA | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3")
MISTRAL = LLAMA | dict(architectures=["MistralForCausalLM"], model_type="mistral")
SLIDING = "sliding_attention"
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)


def theirs(raw: dict[str, Any]) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))


ROPES: dict[str, dict[str, Any]] = {
    "theta at the top": dict(rope_theta=5e5),
    "theta inside": dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "no theta": dict(),
    "linear": dict(rope_theta=2e4, rope_scaling=dict(type="linear", factor=4.0)),
    "both names of the type": dict(
        rope_scaling=dict(type="linear", rope_type="linear", factor=2.5)
    ),
    "a block added to what transformers 5 saved": dict(
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        rope_scaling=dict(rope_type="linear", factor=4.0),
    ),
    "yarn added": dict(
        rope_theta=1e6, rope_parameters=dict(rope_type="default", rope_theta=1e6), rope_scaling=YARN
    ),
    "yarn": dict(rope_theta=1e6, rope_scaling=YARN),
    "yarn without a context": dict(rope_scaling=dict(type="yarn", factor=2.0)),
    "yarn of factor 1": dict(rope_scaling=YARN | dict(factor=1.0)),
    "yarn with a given scale": dict(rope_scaling=YARN | dict(attention_factor=0.7)),
    "yarn with mscale": dict(rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=0.5)),
    "yarn not rounded": dict(rope_scaling=YARN | dict(truncate=False, beta_fast=8, beta_slow=2)),
    "llama3": dict(
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
}

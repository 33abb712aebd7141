"""config.json: what is read as transformers reads it, and what is refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from configs import LLAMA, MISTRAL, QWEN2, QWEN3, ROPES, YARN, theirs

from shardlens.model import ModelConfig

BIASES = [
    (LLAMA, {}, (False, False, False)),
    (LLAMA, dict(attention_bias=True, mlp_bias=True), (True, True, True)),
    (QWEN2, {}, (True, False, False)),
    (QWEN2, dict(attention_bias=False, mlp_bias=True), (True, False, False)),
    (QWEN3, {}, (False, False, False)),
    (QWEN3, dict(attention_bias=True, mlp_bias=True), (True, True, False)),
    (MISTRAL, dict(sliding_window=None, attention_bias=True), (False, False, False)),
]


@pytest.mark.parametrize(("family", "changes", "expected"), BIASES)
def test_biases_are_those_of_the_family(
    family: dict[str, Any], changes: dict[str, Any], expected: tuple[bool, ...]
) -> None:
    """A key that transformers' class does not read changes nothing."""
    import transformers

    config = ModelConfig.from_hf(family | changes)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == expected
    model = transformers.AutoModelForCausalLM.from_config(theirs(family | changes))
    names = {name for name, _ in model.named_parameters() if "layers.0" in name}
    biased = tuple(
        any(f"{part}.bias" in name for name in names) for part in ("q_proj", "o_proj", "up_proj")
    )
    assert biased == expected


@pytest.mark.parametrize(
    "changes",
    [
        dict(architectures=None),
        dict(architectures=[]),
        dict(architectures=["LlamaModel"]),
        dict(model_type=None),
        dict(rms_norm_eps=None, max_position_embeddings=None, head_dim=None),
        dict(rope_theta=None, rope_scaling=None, rope_parameters=None),
        dict(partial_rotary_factor=None, attention_bias=None, tie_word_embeddings=None),
        dict(hidden_act="swish"),
        dict(dtype="auto"),
        dict(torch_dtype="torch.float32", dtype="float32"),
        dict(sliding_window=4),  # which LlamaForCausalLM does not read
        dict(use_cache=False, transformers_version="9", _name_or_path="x", pretraining_tp=1),
        dict(is_llama_config=True, rope_interleaved=False, use_mrope=False),
        dict(anything=None),
    ],
)
def test_what_says_nothing_else_reads_alike(changes: dict[str, Any]) -> None:
    plain = ModelConfig.from_hf(LLAMA | dict(max_position_embeddings=2048))
    read = ModelConfig.from_hf(LLAMA | dict(max_position_embeddings=2048) | changes)
    assert read == plain


def test_heads_that_a_config_leaves_out_are_the_familys() -> None:
    def sizes(family: dict[str, Any], **changes: Any) -> tuple[int, int]:
        raw = {k: v for k, v in (family | changes).items() if v != "absent"}
        config, oracle = ModelConfig.from_hf(raw), theirs(raw)
        head_dim = getattr(oracle, "head_dim", None)
        head_dim = head_dim or oracle.hidden_size // oracle.num_attention_heads
        assert (config.n_kv_heads, config.head_dim) == (oracle.num_key_value_heads, head_dim)
        return config.n_kv_heads, config.head_dim

    assert sizes(LLAMA, num_key_value_heads="absent") == (4, 16)
    assert sizes(LLAMA, num_key_value_heads=None) == (4, 16)
    assert sizes(QWEN3, num_attention_heads=32, num_key_value_heads="absent") == (32, 128)
    assert sizes(QWEN3, num_key_value_heads=None) == (4, 128)
    assert (
        sizes(MISTRAL, sliding_window=None, num_attention_heads=8, num_key_value_heads="absent")[0]
        == 8
    )


@pytest.mark.parametrize(
    ("family", "changes", "slides"),
    [
        (MISTRAL, {}, False),  # 4,096 of transformers' class, beyond the context of 128
        (MISTRAL, dict(max_position_embeddings=8192), True),
        (MISTRAL, dict(sliding_window=None), False),
        (MISTRAL, dict(sliding_window=64), True),
        (MISTRAL, dict(sliding_window=128), False),
        (QWEN2, dict(sliding_window=64), False),
        (QWEN2, dict(sliding_window=64, use_sliding_window=True), False),  # from layer 28 on
        (QWEN2, dict(sliding_window=64, use_sliding_window=True, max_window_layers=3), False),
        (QWEN2, dict(sliding_window=64, use_sliding_window=True, max_window_layers=2), True),
        (QWEN2, dict(sliding_window=None, use_sliding_window=True, max_window_layers=0), False),
        (QWEN2, dict(sliding_window=128, use_sliding_window=True, max_window_layers=0), False),
        (QWEN3, dict(sliding_window=9, layer_types=["full_attention"] * 3), False),
        (
            QWEN3,
            dict(sliding_window=9, layer_types=["full_attention"] * 2 + ["sliding_attention"]),
            True,
        ),
    ],
)
def test_a_window_is_refused_where_it_slides(
    family: dict[str, Any], changes: dict[str, Any], slides: bool
) -> None:
    if not slides:
        assert ModelConfig.from_hf(family | changes).context
        return
    with pytest.raises(ValueError, match="sliding_window"):
        ModelConfig.from_hf(family | changes)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(architectures=["MixtralForCausalLM"]), "'MixtralForCausalLM' is not supported"),
        (dict(architectures=["LlamaForSequenceClassification"]), "SequenceClassification"),
        (dict(model_type="qwen2"), "architectures says LlamaForCausalLM .* 'qwen2'"),
        (dict(architectures=None, model_type="gemma"), "model_type is 'gemma'"),
        (dict(architectures=3), "architectures is 3, not a list"),
        (dict(num_local_experts=8), "key 'num_local_experts' with value 8 is not known"),
        (dict(embedding_multiplier=12.0), "embedding_multiplier is 12.0"),
        (dict(is_encoder_decoder=True), "is_encoder_decoder is True"),
        (dict(quantization_config=dict(quant_method="awq")), "quantised by 'awq'"),
        (dict(quantization_config=True), "quantization_config is True, not a JSON object"),
        (dict(hidden_size="128"), "hidden_size is '128', not a whole number"),
        (dict(hidden_size=-1), "hidden_size is -1"),
        (dict(hidden_size=64.0), "hidden_size is 64.0"),
        (dict(hidden_size=True), "hidden_size is True"),
        (dict(hidden_size=None), "lacks hidden_size"),
        (dict(num_attention_heads=10**30), "num_attention_heads is 10{30}"),
        (dict(num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
        (dict(num_key_value_heads=3), "num_key_value_heads is 3, which does not divide 4"),
        (dict(num_attention_heads=3, num_key_value_heads=3), "not a multiple of 3 heads"),
        (dict(head_dim=15), "heads of 15 numbers"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
        (dict(eos_token_id={}), "eos_token_id is {}"),
        (dict(eos_token_id=[True]), r"eos_token_id is \[True\]"),
        (dict(dtype="float16", torch_dtype="bfloat16"), "torch_dtype is 'bfloat16'"),
        (dict(rope_scaling="linear"), "rope_scaling is 'linear', not a JSON object"),
        (dict(rope_scaling=dict(rope_type="linear")), "rope_scaling lacks factor"),
        (dict(rope_scaling=dict(rope_type="linear", factor=-1)), "factor is -1"),
        (dict(rope_scaling=dict(rope_type="linear", factor=float("inf"))), "factor is inf"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=2)), "rope_type is 'longrope'"),
        (dict(rope_scaling=dict(rope_type="linear", type="yarn", factor=2)), "type is 'yarn'"),
        (dict(rope_scaling=YARN | dict(short_factor=[1])), "'short_factor'"),
        (dict(rope_scaling=ROPES["llama3"]["rope_scaling"] | dict(low_freq_factor=4)), "not below"),
        (
            dict(
                rope_parameters=dict(rope_type="default", rope_theta=1e6),
                rope_scaling=dict(rope_type="linear", factor=4.0),
            ),
            "rope_scaling is in force, with a rope_theta of 10000, and rope_parameters says 1e",
        ),
        (dict(rope_parameters=dict(full_attention={"rope_type": "default"})), "full_attention"),
        (dict(rope_theta=float("inf")), "rope_theta is inf"),
        (dict(model_type="\x1b[2J"), r"\\x1b\[2J"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names) as caught:
        ModelConfig.from_hf(LLAMA | changes)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 300 and "config.json" in message


def test_mutated_configs_are_read_or_refused_in_one_line(shared_data: Path) -> None:
    """Values of true configs replaced by other kinds of values; 500 files, no traceback."""
    chance = random.Random(0)
    sources = [json.loads(p.read_text()) for p in sorted(shared_data.glob("configs/*/config.json"))]
    values = [
        None,
        True,
        -1,
        0,
        1.5,
        2**63,
        10**30,
        1e308,
        float("nan"),
        "8",
        "",
        [],
        [1],
        {},
        [[]],
    ]
    read = 0
    for _ in range(500):
        raw = json.loads(json.dumps(chance.choice(sources)))
        at = raw
        key = chance.choice(list(raw))
        if isinstance(raw[key], dict) and raw[key] and chance.random() < 0.7:
            at, key = raw[key], chance.choice(list(raw[key]))
        at[key] = chance.choice(values)
        try:
            ModelConfig.from_hf(raw)
            read += 1
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 300
    assert 50 < read < 400

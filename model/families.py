"""Each family's architecture as data, and the keys that its config.json may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .fields import Fields, shown


@dataclass(frozen=True)
class Family:
    """Settings that come with a family; those of transformers where config.json is silent.

    qkv_bias, o_bias: None if `attention_bias` says so. mlp_bias: None if `mlp_bias` says so.
    kv_heads: None for as many as heads. head_dim: None for d / heads. window: which attention
    slides: "none", "all" (by `sliding_window`), or "layers" (if `use_sliding_window`).
    """

    qkv_bias: bool | None = False
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    context: int = 2048
    window: str = "none"
    sliding_window: int | None = None


# By model_type.
FAMILIES = {
    "llama": Family(qkv_bias=None, o_bias=None, mlp_bias=None),
    "mistral": Family(kv_heads=8, context=131_072, window="all", sliding_window=4096),
    "qwen2": Family(
        qkv_bias=True, kv_heads=32, context=32_768, window="layers", sliding_window=4096
    ),
    "qwen3": Family(
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
        kv_heads=32,
        head_dim=128,
        context=32_768,
        window="layers",
        sliding_window=4096,
    ),
}
_STEMS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ARCHITECTURES = {f"{stem}ForCausalLM": model_type for model_type, stem in _STEMS.items()}
# Saved without its head: the tied embedding, or none at all, which loading then names.
_BARE = {f"{stem}Model": model_type for model_type, stem in _STEMS.items()}

USED = frozenset(
    "architectures model_type vocab_size hidden_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim intermediate_size rms_norm_eps max_position_embeddings "
    "rope_theta rope_scaling rope_parameters partial_rotary_factor attention_bias mlp_bias "
    "tie_word_embeddings dtype torch_dtype eos_token_id hidden_act quantization_config "
    "sliding_window use_sliding_window max_window_layers layer_types".split()
)
# Read by no forward pass of these families: training, generation defaults, records of tools.
IGNORED = frozenset(
    "_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path "
    "attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens "
    "bos_token_id classifier_dropout cross_attention_hidden_size custom_pipelines "
    "decoder_start_token_id diversity_penalty do_sample early_stopping embd_pdrop "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id hidden_dropout id2label initializer_range "
    "is_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty max_length "
    "max_sequence_length min_length model_max_length neftune_noise_alpha no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states "
    "output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values "
    "repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id "
    "suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder "
    "tokenizer_class top_k top_p torchscript transformers.js_config transformers_version "
    "trust_remote_code typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 "
    "use_cache".split()
)
# Keys of other models' forward passes, at the value that leaves these families as they are.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "chunk_size_feed_forward": 0,
    "clip_qkv": None,
    "embedding_multiplier": None,
    "final_logit_softcapping": None,
    "is_encoder_decoder": False,
    "logits_scaling": None,
    "pruned_heads": {},
    "qk_layernorm": False,
    "residual_multiplier": None,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_qk_norm": False,
}


def model_type_of(config: Fields) -> str:
    """The family that a config.json names. Raises ValueError where it names none, or two."""
    named = config.texts("architectures")
    model_type = config.value("model_type")
    if not named and model_type is None:
        raise ValueError(f"{config.source} has neither architectures nor model_type")
    if named:
        by_name = (ARCHITECTURES | _BARE).get(named[0])
        if by_name is None:
            raise ValueError(
                f"{config.source}: architecture {shown(named[0])} is not supported: shardlens "
                f"runs {', '.join(ARCHITECTURES)}"
            )
        if model_type not in (None, by_name):
            raise ValueError(
                f"{config.source}: architectures says {named[0]} and model_type says "
                f"{shown(model_type)}; they must name one family"
            )
        return by_name
    return config.choice("model_type", FAMILIES, "")


def architecture_of(model_type: str) -> str:
    """The class that transformers gives a model of this type."""
    return f"{_STEMS[model_type]}ForCausalLM"


def refuse_unknown_keys(config: Fields) -> None:
    """Raise ValueError for a key that is not known, or whose value changes what is computed."""
    for name, neutral in NEUTRAL.items():
        if config.value(name, neutral) != neutral:
            raise config.error(name, f"not supported: only {neutral!r}")
    config.refuse_unknown(USED | IGNORED | NEUTRAL.keys())

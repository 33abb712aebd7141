"""A transformers model on the memory of ours, so that rivals run on the same weights, held once."""

from __future__ import annotations

from typing import Any

import torch

from ..model.config import ModelConfig, RopeScaling
from ..model.transformer import Transformer
from ..model.weights import hf_state_dict


def as_transformers(model: Transformer, dtype: torch.dtype | None = None) -> Any:
    """`model` as transformers runs it, with sdpa attention, in evaluation.

    Its parameters are views of ours: q, k, v and gate, up are rows of fused weights. With another
    dtype than the model's they are copies in it. Raises ValueError where transformers is missing
    or has no such model.
    """
    assert model.parallel.size == 1, "the views need the whole model on one rank"
    config = transformers_config(model.config, dtype or model.dtype)
    model_class = getattr(_transformers(), model.config.architecture)
    with torch.device("meta"):
        hf = model_class(config).eval().requires_grad_(False)
    tensors = {name: t.to(dtype or model.dtype) for name, t in hf_state_dict(model).items()}
    if model.config.tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    differing = sorted(hf.state_dict().keys() ^ tensors.keys())
    if differing:
        raise ValueError(
            f"{model.config.architecture} of transformers and this model differ in {differing[0]}"
        )
    hf.load_state_dict(tensors, assign=True)
    # Frequencies are no part of a checkpoint: those above are on meta. They stay in float32.
    rotary = hf.model.rotary_emb
    hf.model.rotary_emb = type(rotary)(config=config).to(model.device)
    assert not any(tensor.is_meta for tensor in (*hf.parameters(), *hf.buffers()))
    return hf


def transformers_config(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The config with which transformers builds the same model."""
    family = config.architecture.removesuffix("ForCausalLM")
    config_class = getattr(_transformers(), f"{family}Config")
    return config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.d,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        rope_parameters=_rope_parameters(config.rope_scaling, config.rope_theta),
        attention_bias=config.qkv_bias,
        mlp_bias=config.mlp_bias,
        tie_word_embeddings=config.tied_head,
        attn_implementation="sdpa",
        dtype=dtype,
    )


def _rope_parameters(scaling: RopeScaling, theta: float) -> dict[str, Any]:
    given: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": theta}
    if scaling.kind != "default":
        given |= {"factor": scaling.factor}
    if scaling.kind == "llama3":
        given |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return given


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("needs transformers: pip install 'shardlens[dev]'") from None
    return transformers

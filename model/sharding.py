"""The parameter that every tensor of a checkpoint fills, and how it is split, as data.

Each of our parameters is one or more checkpoint tensors concatenated along dim 0 (q, k, v; gate,
up), and each of those is split separately, so a rank's part of a fused weight is the concatenation
of its parts.
"""

from __future__ import annotations

from ..parallel.spans import (
    Span,
    StoredTensor,
    split_even,
    split_heads,
    split_vocab,
    whole,
)
from .config import ModelConfig

# parameter -> the checkpoint tensors that fill it, in order
TensorTable = dict[str, tuple[StoredTensor, ...]]

EMBED: TensorTable = {"embed.weight": (StoredTensor("model.embed_tokens.weight", ("vocab", "d")),)}
HEAD: TensorTable = {"head.weight": (StoredTensor("lm_head.weight", ("vocab", "d")),)}
NORM: TensorTable = {"norm.weight": (StoredTensor("model.norm.weight", ("d",)),)}

BLOCK: TensorTable = {
    "attn_norm.weight": (StoredTensor("input_layernorm.weight", ("d",)),),
    "attn.qkv.weight": (
        StoredTensor("self_attn.q_proj.weight", ("heads", "d")),
        StoredTensor("self_attn.k_proj.weight", ("kv_heads", "d")),
        StoredTensor("self_attn.v_proj.weight", ("kv_heads", "d")),
    ),
    "attn.o.weight": (StoredTensor("self_attn.o_proj.weight", ("d", "heads")),),
    "mlp_norm.weight": (StoredTensor("post_attention_layernorm.weight", ("d",)),),
    "mlp.gate_up.weight": (
        StoredTensor("mlp.gate_proj.weight", ("ffn", "d")),
        StoredTensor("mlp.up_proj.weight", ("ffn", "d")),
    ),
    "mlp.down.weight": (StoredTensor("mlp.down_proj.weight", ("d", "ffn")),),
}
QKV_BIAS: TensorTable = {
    "attn.qkv.bias": (
        StoredTensor("self_attn.q_proj.bias", ("heads",)),
        StoredTensor("self_attn.k_proj.bias", ("kv_heads",)),
        StoredTensor("self_attn.v_proj.bias", ("kv_heads",)),
    )
}
O_BIAS: TensorTable = {"attn.o.bias": (StoredTensor("self_attn.o_proj.bias", ("d",)),)}
MLP_BIAS: TensorTable = {
    "mlp.gate_up.bias": (
        StoredTensor("mlp.gate_proj.bias", ("ffn",)),
        StoredTensor("mlp.up_proj.bias", ("ffn",)),
    ),
    "mlp.down.bias": (StoredTensor("mlp.down_proj.bias", ("d",)),),
}
QK_NORM: TensorTable = {
    "attn.q_norm.weight": (StoredTensor("self_attn.q_norm.weight", ("head_dim",)),),
    "attn.k_norm.weight": (StoredTensor("self_attn.k_norm.weight", ("head_dim",)),),
}


def rank_spans(config: ModelConfig, rank: int, size: int) -> dict[str, Span]:
    """The part that rank `rank` of `size` holds of every named dim."""
    heads, kv_heads = split_heads(config.n_heads, config.n_kv_heads, config.head_dim, rank, size)
    return {
        "d": whole(config.d),
        "head_dim": whole(config.head_dim),
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn": split_even(config.ffn_size, rank, size),
        "vocab": split_vocab(config.vocab_size, rank, size),
    }


def tensor_table(config: ModelConfig) -> TensorTable:
    """The checkpoint tensors of every parameter of a model, block by block."""
    block = dict(BLOCK)
    block |= QKV_BIAS if config.qkv_bias else {}
    block |= O_BIAS if config.o_bias else {}
    block |= MLP_BIAS if config.mlp_bias else {}
    block |= QK_NORM if config.qk_norm else {}
    table = dict(EMBED)
    for layer in range(config.n_layers):
        for name, tensors in block.items():
            table[f"blocks.{layer}.{name}"] = tuple(
                StoredTensor(f"model.layers.{layer}.{tensor.name}", tensor.dims)
                for tensor in tensors
            )
    return table | NORM | ({} if config.tied_head else HEAD)

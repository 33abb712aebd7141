"""Where every tensor of a checkpoint goes, as data; the transformer itself knows of none of it.

Each of our parameters is one or more checkpoint tensors laid one after another along dim 0
(q, k, v; gate, up), and each of those is split on its own, so a rank's part of a fused weight is
the fusion of its parts.
"""

from __future__ import annotations

from ..parallel.spans import (
    Placed,
    Span,
    split_even,
    split_heads,
    split_kv_heads,
    split_vocab,
    whole,
)
from .config import ModelConfig

# parameter -> the checkpoint tensors that fill it, in order
Placements = dict[str, tuple[Placed, ...]]

EMBED: Placements = {"embed.weight": (Placed("model.embed_tokens.weight", ("vocab", "d")),)}
HEAD: Placements = {"head.weight": (Placed("lm_head.weight", ("vocab", "d")),)}
NORM: Placements = {"norm.weight": (Placed("model.norm.weight", ("d",)),)}

BLOCK: Placements = {
    "attn_norm.weight": (Placed("input_layernorm.weight", ("d",)),),
    "attn.qkv.weight": (
        Placed("self_attn.q_proj.weight", ("heads", "d")),
        Placed("self_attn.k_proj.weight", ("kv_heads", "d")),
        Placed("self_attn.v_proj.weight", ("kv_heads", "d")),
    ),
    "attn.o.weight": (Placed("self_attn.o_proj.weight", ("d", "heads")),),
    "mlp_norm.weight": (Placed("post_attention_layernorm.weight", ("d",)),),
    "mlp.gate_up.weight": (
        Placed("mlp.gate_proj.weight", ("ffn", "d")),
        Placed("mlp.up_proj.weight", ("ffn", "d")),
    ),
    "mlp.down.weight": (Placed("mlp.down_proj.weight", ("d", "ffn")),),
}
QKV_BIAS: Placements = {
    "attn.qkv.bias": (
        Placed("self_attn.q_proj.bias", ("heads",)),
        Placed("self_attn.k_proj.bias", ("kv_heads",)),
        Placed("self_attn.v_proj.bias", ("kv_heads",)),
    )
}
O_BIAS: Placements = {"attn.o.bias": (Placed("self_attn.o_proj.bias", ("d",)),)}
MLP_BIAS: Placements = {
    "mlp.gate_up.bias": (
        Placed("mlp.gate_proj.bias", ("ffn",)),
        Placed("mlp.up_proj.bias", ("ffn",)),
    ),
    "mlp.down.bias": (Placed("mlp.down_proj.bias", ("d",)),),
}
QK_NORM: Placements = {
    "attn.q_norm.weight": (Placed("self_attn.q_norm.weight", ("head_dim",)),),
    "attn.k_norm.weight": (Placed("self_attn.k_norm.weight", ("head_dim",)),),
}


def rank_spans(config: ModelConfig, rank: int, size: int) -> dict[str, Span]:
    """What rank `rank` of `size` holds of every named dim.

    Raises ValueError where the model cannot be split over that many ranks.
    """
    return {
        "d": whole(config.d),
        "head_dim": whole(config.head_dim),
        "heads": split_heads(config.n_heads, config.head_dim, rank, size),
        "kv_heads": split_kv_heads(config.n_kv_heads, config.head_dim, rank, size),
        "ffn": split_even(config.ffn_size, rank, size),
        "vocab": split_vocab(config.vocab_size, rank, size),
    }


def placements(config: ModelConfig) -> Placements:
    """The checkpoint tensors of every parameter of a model, block by block."""
    block = dict(BLOCK)
    block |= QKV_BIAS if config.qkv_bias else {}
    block |= O_BIAS if config.o_bias else {}
    block |= MLP_BIAS if config.mlp_bias else {}
    block |= QK_NORM if config.qk_norm else {}
    table = dict(EMBED)
    for layer in range(config.n_layers):
        for name, placed in block.items():
            table[f"blocks.{layer}.{name}"] = tuple(
                Placed(f"model.layers.{layer}.{part.source}", part.dims) for part in placed
            )
    return table | NORM | ({} if config.tied_head else HEAD)

"""Models to measure: shapes as published, random weights, and the same weights in transformers.

A rank of p holds 1 / p of the heads, of the MLP and of the vocabulary, and whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..model import ModelConfig, RopeScaling, Transformer, hf_state_dict, init_weights
from ..parallel import TensorParallel


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what a block and the head cost."""

    d: int
    n_heads: int
    kv_heads: int
    head_dim: int
    f: int  # width of the MLP
    vocab: int
    qk_norm: bool

    def heads_per_rank(self, ranks: int) -> dict[str, int]:
        """Query heads H, key and value heads K (replicated where ranks exceed them), and D."""
        return {
            "H": self.n_heads // ranks,
            "K": max(1, self.kv_heads // ranks),
            "D": self.head_dim,
        }


MODELS = {
    "llama-3.1-8b": ModelShape(4096, 32, 8, 128, 14336, 128_256, False),
    "llama-3.1-70b": ModelShape(8192, 64, 8, 128, 28672, 128_256, False),
    "qwen3-4b": ModelShape(2560, 32, 8, 128, 9728, 151_936, True),
    "qwen3-14b": ModelShape(5120, 40, 8, 128, 17408, 151_936, True),
    "qwen3-32b": ModelShape(5120, 64, 8, 128, 25600, 151_936, True),
}
N_LAYERS = dict(zip(MODELS, (32, 80, 36, 40, 64), strict=True))
TIED = ("qwen3-4b",)
ROPE_THETA = {"llama": 5e5, "qwen3": 1e6}
CONTEXT = 8192
# With the number of layers. cpu: Llama-3.2-1B at half its width, with the vocabulary of Llama 2.
CPU_SHAPES = {
    "cpu": (ModelShape(1024, 16, 4, 64, 4096, 32_000, False), 16),
    "cpu-small": (ModelShape(128, 8, 4, 16, 256, 2_003, False), 4),
}
STD = 0.02


@dataclass(frozen=True)
class Grid:
    """Models, rank counts, and how much work: rows, or (requests, positions)."""

    models: tuple[str, ...]
    ranks: tuple[int, ...]
    rows: tuple[int, ...]  # of norm and MLP: a decode step, a lens of all layers, prefill
    head_rows: tuple[int, ...]
    rope: tuple[tuple[int, int], ...]  # requests, new tokens
    attention: tuple[tuple[int, int], ...]  # requests, context


GRIDS = {
    "full": Grid(
        models=tuple(MODELS),
        ranks=(1, 2, 4, 8),
        rows=(8, 512, 4096, 16384),
        head_rows=(8, 64, 512, 4096),
        rope=((8, 1), (1, 4096)),
        attention=((1, 8192), (8, 1500), (8, 8192)),
    ),
    "small": Grid(  # what one CPU thread does in minutes
        models=("llama-3.1-8b", "qwen3-4b"),
        ranks=(8,),
        rows=(8, 256),
        head_rows=(8, 64),
        rope=((8, 1), (1, 256)),
        attention=((8, 1500), (8, 8192)),
    ),
}


def model_config(name: str) -> ModelConfig:
    """The config of a whole model. Raises ValueError for an unknown name."""
    if name in CPU_SHAPES:
        return _config(*CPU_SHAPES[name], tied=False, rope_theta=1e4)
    if name not in MODELS:
        raise ValueError(f"shape {name}: there are {', '.join((*CPU_SHAPES, *MODELS))}")
    theta = ROPE_THETA[name.split("-")[0]]
    return _config(MODELS[name], N_LAYERS[name], tied=name in TIED, rope_theta=theta)


def _config(shape: ModelShape, n_layers: int, *, tied: bool, rope_theta: float) -> ModelConfig:
    content: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM"],
        "vocab_size": shape.vocab,
        "hidden_size": shape.d,
        "intermediate_size": shape.f,
        "num_hidden_layers": n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": CONTEXT,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
    }
    return ModelConfig.from_hf(content)


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype that is measured: bf16 on a GPU, float32 on a CPU, where bf16 may be emulated."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def random_model(
    config: ModelConfig, parallel: TensorParallel, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """On a CPU the weights are the same for every rank count; on a GPU they are drawn there, which
    takes seconds instead of minutes, and each rank draws its own.
    """
    if device.type == "cpu":
        model = Transformer(config, parallel=parallel, dtype=dtype)
        init_weights(model, std=STD)
        return model.eval().requires_grad_(False)
    model = Transformer(config, parallel=parallel, dtype=dtype, device="meta")
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(parallel.rank)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(std=STD, generator=generator)
    return model.eval().requires_grad_(False)


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
    if scaling.kind in ("llama3", "yarn", "dynamic"):
        given |= {"original_max_position_embeddings": scaling.original_context}
    if scaling.kind == "llama3":
        given |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    if scaling.kind == "yarn":
        given |= {"beta_slow": scaling.low, "beta_fast": scaling.high}
        given |= {"attention_factor": scaling.attention_factor, "truncate": scaling.truncate}
    return given


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("needs transformers: pip install 'shardlens[dev]'") from None
    return transformers

"""Whole models at true shapes with random weights, made on the device."""

from __future__ import annotations

from typing import Any

import torch

from ..model.config import ModelConfig
from ..model.transformer import Transformer
from ..model.weights import init_weights
from ..parallel.group import TensorParallel
from .shapes import MODELS, ModelShape

N_LAYERS = {
    "llama-3.1-8b": 32,
    "llama-3.1-70b": 80,
    "qwen3-4b": 36,
    "qwen3-14b": 40,
    "qwen3-32b": 64,
}
TIED = ("qwen3-4b",)
ROPE_THETA = {"llama": 5e5, "qwen3": 1e6}
CONTEXT = 8192
# With its layers. cpu: Llama-3.2-1B at half its width, with the vocabulary of Llama 2.
CPU_SHAPES = {
    "cpu": (ModelShape(1024, 16, 4, 64, 4096, 32_000, False), 16),
    "cpu-small": (ModelShape(128, 8, 4, 16, 256, 2_003, False), 4),
}
STD = 0.02


def model_config(name: str) -> ModelConfig:
    """Raises ValueError for an unknown name."""
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

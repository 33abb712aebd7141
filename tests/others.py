"""Small untrained models of transformers, and whether hooks are left in one."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
IDS = torch.arange(14).view(2, 7) * 5 % 97


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE))


def hooks(model: nn.Module) -> int:
    """How many hooks of passes the modules have."""
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


def is_clean(model: nn.Module) -> bool:
    return hooks(model) == 0

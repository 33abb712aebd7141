"""Answers from outside: small transformers models, and the lens from float64 full logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tolerances import KERNEL_EPS, KERNEL_MEAN
from torch import Tensor

SMALL = dict(
    vocab_size=509,
    hidden_size=48,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=10000.0,
)
# The published model, as its config.json has it.
LLAMA_405B = dict(
    architectures=["LlamaForCausalLM"],
    hidden_size=16384,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    intermediate_size=53248,
    vocab_size=128256,
    max_position_embeddings=131072,
    torch_dtype="bfloat16",
)
# Every family, GQA ratio, tied and untied head, bias, q/k norm and rope scaling.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", dict(num_key_value_heads=4)),
    "llama-gqa-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3-rope": ("Llama", dict(rope_parameters=LLAMA3_ROPE, head_dim=16)),
    "llama-linear-rope": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    ),
    "llama-yarn": (
        "Llama",
        dict(
            rope_parameters=dict(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                rope_theta=100.0,
            ),
            head_dim=16,
        ),
    ),
    "qwen3-yarn-mscale": (
        "Qwen3",
        dict(
            rope_parameters=dict(
                rope_type="yarn",
                factor=8.0,
                original_max_position_embeddings=16,
                rope_theta=1e4,
                beta_fast=4.0,
                beta_slow=0.5,
                mscale=2.0,
                mscale_all_dim=0.5,
                truncate=False,
            ),
            head_dim=20,
        ),
    ),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=20)),
    # heads that no rank count below divides
    "llama-9-heads": (
        "Llama",
        dict(
            num_attention_heads=9,
            num_key_value_heads=3,
            hidden_size=54,
            head_dim=16,
            attention_bias=True,
        ),
    ),
    "qwen2-14-heads": (
        "Qwen2",
        dict(num_attention_heads=14, num_key_value_heads=2, hidden_size=56, vocab_size=511),
    ),
    "qwen3-15-heads": (
        "Qwen3",
        dict(num_attention_heads=15, num_key_value_heads=5, head_dim=12, hidden_size=60),
    ),
    # on 3 ranks one holds a kv head twice
    "qwen3-16-heads": (
        "Qwen3",
        dict(num_attention_heads=16, num_key_value_heads=4, head_dim=12, hidden_size=60),
    ),
    "llama-mqa": ("Llama", dict(num_key_value_heads=1)),
    "qwen2": ("Qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=20)),
    "qwen3-tied": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}


def hf_model(name: str, **changes: Any) -> Any:
    """A small random transformers model; biases and norms are random too, so that they count."""
    import transformers

    family, options = FAMILIES[name]
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}ForCausalLM")
    config = config_class(**(SMALL | options | changes))
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.3 * noise)
    return model


def save(model: Any, directory: Path, *, shards: bool = False) -> Path:
    model.save_pretrained(directory, max_shard_size="60KB" if shards else "5GB")
    return directory


@dataclass
class ExactLens:
    """The lens from full float64 logits: rows [N, P] of states, the last tap the final layer."""

    order: Tensor  # [N, P, V] ids, best first, ties by the lower id
    logprobs: Tensor  # [N, P, V] by id
    entropy: Tensor  # [N, P]
    kl_to_final: Tensor  # [N, P]

    def rank(self, targets: Tensor) -> Tensor:
        """targets [N] -> [N, P]."""
        return (self.order == targets[:, None, None]).int().argmax(-1)

    def target_logprob(self, targets: Tensor) -> Tensor:
        return self.logprobs.gather(-1, targets[:, None, None].expand(*self.entropy.shape, 1))[
            ..., 0
        ]


def exact_lens(normed: Tensor, weight: Tensor) -> ExactLens:
    """normed [N, P, d], the final norm already applied; weight [V, d]."""
    logits = normed.double() @ weight.double().T
    logprobs = logits.log_softmax(-1)
    final = logprobs[:, -1:]
    return ExactLens(
        order=torch.sort(logits, dim=-1, descending=True, stable=True).indices,
        logprobs=logprobs,
        entropy=-(logprobs.exp() * logprobs).sum(-1),
        kl_to_final=(final.exp() * (final - logprobs)).sum(-1),
    )


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor, *, lost: float = 0.0) -> None:
    """|ours - truth| is at most |plain - truth| plus a tiny epsilon, in the largest and the mean.

    plain: the same-dtype PyTorch expression; truth: float64. The epsilon is KERNEL_EPS float32
    roundings, whatever the dtype, at the size of the row's largest value. lost: what tensor cores
    lose of that value beside, see `tensor_core_slack`.
    """
    assert ours.shape == plain.shape == truth.shape and ours.dtype == plain.dtype
    assert truth.isfinite().all() and ours.isfinite().all()
    if not truth.numel():
        return
    error, allowed = (ours.double() - truth).abs(), (plain.double() - truth).abs()
    # a row or tensor of large values must not excuse errors of a small one: scale by row
    scale = truth.abs().amax(-1, keepdim=True)
    slack = (KERNEL_EPS * torch.finfo(torch.float32).eps + lost) * scale
    over = error.amax(-1, keepdim=True) - allowed.amax(-1, keepdim=True) - slack
    assert (over <= 0).all(), f"{over.max().item():.3g} beyond what is allowed"
    assert error.mean() <= KERNEL_MEAN * allowed.mean() + slack.mean()

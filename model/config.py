"""What a checkpoint's config.json says, as one frozen record for every family.

Families differ in data only: biases, q/k norms, rope scaling, tied head. Anything this runtime
does not compute exactly is refused by name. Importing torch takes seconds, and a plan needs none
of it, so dtypes are kept by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from ..tokenizer.json_file import read_json

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Family:
    """What an architecture's name implies, where config.json does not say it."""

    qkv_bias: bool = False
    o_bias_follows_qkv: bool = True
    qk_norm: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias_follows_qkv=False),
    "Qwen3ForCausalLM": Family(qk_norm=True),
}


@dataclass(frozen=True)
class RopeScaling:
    """How inverse frequencies are changed for longer contexts: "default", "linear", "llama3"."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    d: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    context: int
    rope_theta: float
    rope_scaling: RopeScaling
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    dtype_name: str
    eos_token_ids: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype_name)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """From a config.json (a path or its parsed content).

        Raises ValueError naming the first thing that is missing or not supported.
        """
        raw = source if isinstance(source, Mapping) else read_json(Path(source))
        try:
            return _parse(raw)
        except KeyError as missing:
            raise ValueError(f"config.json lacks {missing}") from None


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name in DTYPE_BYTES."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _parse(raw: Mapping[str, Any]) -> ModelConfig:
    architecture = _architecture(raw)
    _refuse_what_we_do_not_compute(raw)
    family = FAMILIES[architecture]
    n_heads, d = raw["num_attention_heads"], raw["hidden_size"]
    qkv_bias = bool(raw.get("attention_bias", family.qkv_bias))
    rope_theta, rope_scaling = _rope(raw)
    eos = raw.get("eos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=raw["vocab_size"],
        d=d,
        n_layers=raw["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=raw.get("num_key_value_heads") or n_heads,
        head_dim=raw.get("head_dim") or d // n_heads,
        ffn_size=raw["intermediate_size"],
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        context=raw["max_position_embeddings"],
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=qkv_bias,
        o_bias=qkv_bias and family.o_bias_follows_qkv,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        dtype_name=_dtype_name(raw),
        eos_token_ids=token_id_tuple(eos),
    )


def token_id_tuple(value: Any) -> tuple[int, ...]:
    """eos_token_id is absent, one id or a list of ids in the wild."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures") or [None]
    if named[0] not in FAMILIES:
        raise ValueError(
            f"architecture {named[0]} is not supported: shardlens runs {', '.join(FAMILIES)}"
        )
    return str(named[0])


def _refuse_what_we_do_not_compute(raw: Mapping[str, Any]) -> None:
    quantised = raw.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown")
        raise ValueError(
            f"quantised weights ({method}) are not supported: use the bf16 or fp32 checkpoint"
        )
    sliding_layers = "sliding_attention" in (raw.get("layer_types") or ())
    if raw.get("use_sliding_window") or sliding_layers:
        raise ValueError("sliding window attention is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']} is not supported: only silu is")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """Newer configs hold `rope_parameters`; older ones `rope_theta` and `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(f"rope type {kind} is not supported: only default, linear and llama3 are")


def _dtype_name(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ValueError(f"dtype {name} is not supported: only {', '.join(DTYPE_BYTES)} are")
    return name

"""A checkpoint's config.json as one frozen record, the same for every family.

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
from .families import FAMILIES, Family, architecture_of, model_type_of, refuse_unknown_keys
from .fields import Fields, shown
from .rope_config import RopeScaling, read_rope

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    fp8_block: tuple[int, int] | None = None  # rows and columns of stored weights with one scale

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype_name)

    @classmethod
    def from_hf(
        cls, source: str | Path | Mapping[str, Any], name: str = "config.json"
    ) -> ModelConfig:
        """From a config.json: a path, or its parsed content, which messages call `name`.

        Raises ValueError naming the first thing that is missing, unknown or not supported.
        """
        if isinstance(source, Mapping):
            return _parse(Fields(source, name))
        return _parse(Fields(read_json(Path(source)), str(source)))


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name in DTYPE_BYTES."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _parse(config: Fields) -> ModelConfig:
    model_type = model_type_of(config)
    family = FAMILIES[model_type]
    fp8_block = _fp8_block(config)
    refuse_unknown_keys(config)
    config.choice("hidden_act", ("silu", "swish"), "silu")
    if config.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        raise config.error("partial_rotary_factor", "not supported: only 1")
    d = config.integer("hidden_size", 1, 2**17)
    n_layers = config.integer("num_hidden_layers", 1, 1024)
    context = config.integer("max_position_embeddings", 1, 2**27, family.context)
    theta, scaling, context = read_rope(config, context)
    _refuse_sliding_window(config, family, n_layers, context)
    n_heads, n_kv_heads, head_dim = _heads(config, family, d)
    attention_bias = config.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture_of(model_type),
        vocab_size=config.integer("vocab_size", 1, 2**24),
        d=d,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_size=config.integer("intermediate_size", 1, 2**20),
        norm_eps=config.number("rms_norm_eps", 1e-12, 1.0, 1e-6),
        context=context,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=config.flag("mlp_bias", False) if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        tied_head=config.flag("tie_word_embeddings", False),
        dtype_name=_dtype_name(config),
        eos_token_ids=token_ids(config, "eos_token_id"),
        fp8_block=fp8_block,
    )


def token_ids(fields: Fields, name: str) -> tuple[int, ...]:
    """A field that is absent, one id or a list of ids in the wild."""
    value = fields.value(name, [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(id) is int and 0 <= id < 2**31 for id in ids):
        raise fields.error(name, "not a token id or a list of them")
    return tuple(ids)


def _fp8_block(config: Fields) -> tuple[int, int] | None:
    """The block size of FP8 weights with a scale per block; other quantisation is refused."""
    quantized = config.object("quantization_config")
    if quantized is None:
        return None
    block = quantized.value("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2
    is_block = is_block and all(type(n) is int and 0 < n < 2**20 for n in block)
    if quantized.value("quant_method") != "fp8" or not is_block:
        raise ValueError(
            f"{config.source}: weights quantised by {shown(quantized.value('quant_method'))} are "
            "not supported, but for fp8 with a weight_block_size: use the bf16 or fp32 checkpoint"
        )
    quantized.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    return block[0], block[1]


def _heads(config: Fields, family: Family, d: int) -> tuple[int, int, int]:
    """The number of heads, of key and value heads, and their size."""
    n_heads = config.integer("num_attention_heads", 1, 2**14)
    # null means as many as heads; absent, what the family's own class says
    is_null = config.has_null("num_key_value_heads") or family.kv_heads is None
    default = n_heads if is_null else family.kv_heads
    n_kv_heads = config.integer("num_key_value_heads", 1, 2**14, default)
    if n_heads % n_kv_heads:
        raise config.error("num_key_value_heads", f"which does not divide {n_heads} heads")
    head_dim = config.integer("head_dim", 2, 1024, family.head_dim)
    if head_dim is None:
        if d % n_heads:
            raise config.error(
                "hidden_size", f"not a multiple of {n_heads} heads, without head_dim"
            )
        head_dim = d // n_heads
    if head_dim % 2:
        raise ValueError(f"{config.source}: heads of {head_dim} numbers cannot be rotated in pairs")
    return n_heads, n_kv_heads, head_dim


def _refuse_sliding_window(config: Fields, family: Family, n_layers: int, context: int) -> None:
    """Raise ValueError where some layer's attention does not see the whole context."""
    if family.window == "none":
        return
    window = config.integer("sliding_window", 1, 2**31, family.sliding_window)
    if config.has_null("sliding_window"):
        window = None
    layer_types = config.texts("layer_types")
    if layer_types and len(layer_types) != n_layers:
        raise config.error("layer_types", f"which names {len(layer_types)} of {n_layers} layers")
    other = set(layer_types) - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(f"{config.source}: layer type {shown(min(other))} is not supported")
    slides = family.window == "all"
    if family.window == "layers":
        first = config.integer("max_window_layers", 0, 2**31, 28)
        slides = config.flag("use_sliding_window", False) and first < n_layers
        slides = "sliding_attention" in layer_types if layer_types else slides
    if slides and window is not None and window < context:
        raise ValueError(
            f"{config.source}: sliding window attention is not supported (sliding_window {window}, "
            f"below the context of {context})"
        )


def _dtype_name(config: Fields) -> str:
    given = [str(config.value(name)) for name in ("dtype", "torch_dtype") if name in config]
    texts = {text.removeprefix("torch.") for text in given} - {"auto"}
    if len(texts) > 1:
        raise config.error("dtype", f"but torch_dtype is {shown(config.value('torch_dtype'))}")
    for text in texts:
        if text not in DTYPE_BYTES:
            raise ValueError(
                f"{config.source}: dtype {shown(text)} is not supported: only "
                f"{', '.join(DTYPE_BYTES)} are"
            )
        return text
    return "float32"

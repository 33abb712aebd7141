"""A .gguf file of llama.cpp: its config in transformers' words, and its tensors dequantised.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has the keys. The `gguf` library reads
the file and undoes its quantisation, row by row, so that each rank reads its own slices.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parallel.spans import Span
from ..tokenizer.paths import check_regular
from .config import ModelConfig
from .gguf_header import GGUF_BROKEN, gguf_reader
from .rope_config import RopeScaling

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from torch import Tensor

_TYPES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()
_ARCHITECTURES = ("llama", "qwen2", "qwen3")

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"  # what llama3 scaling divides the frequencies by


class GgufFile:
    """A .gguf file; see `Weights`. Raises ValueError naming the file where it is broken."""

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self._reader = _opened(path)
        self._stored: dict[str, ReaderTensor] = {}
        for tensor in self._reader.tensors:
            if tensor.name != _FREQUENCIES:
                self._stored[self._hf_name(tensor.name)] = tensor
        self.shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._stored.items()
        }

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """All keys and their values."""
        try:
            return {name: field.contents() for name, field in self._reader.fields.items()}
        except GGUF_BROKEN as error:
            raise ValueError(f"{self.origin} has broken metadata ({error})") from None

    @cached_property
    def config(self) -> ModelConfig:
        """As of a config.json. Raises ValueError for what is not supported."""
        kind = self.metadata.get("general.architecture")
        if kind not in _ARCHITECTURES:
            raise ValueError(
                f"{self.origin}: architecture {kind!r} is not supported: only "
                f"{', '.join(_ARCHITECTURES)} are"
            )
        keys = {k.removeprefix(f"{kind}."): v for k, v in self.metadata.items()}
        _refuse_others(keys, self.origin)
        raw = {
            "model_type": kind,
            "vocab_size": self._rows("model.embed_tokens.weight"),
            "hidden_size": keys.get("embedding_length"),
            "num_hidden_layers": keys.get("block_count"),
            "num_attention_heads": keys.get("attention.head_count"),
            "num_key_value_heads": keys.get("attention.head_count_kv"),
            "head_dim": keys.get("attention.key_length", keys.get("rope.dimension_count")),
            "intermediate_size": keys.get("feed_forward_length"),
            "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": keys.get("context_length"),
            "rope_theta": keys.get("rope.freq_base"),
            "rope_scaling": _rope_scaling(keys),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "eos_token_id": self._stop_ids(),
            "dtype": "bfloat16",
        }
        if kind != "qwen2":
            bias = "model.layers.0.self_attn.q_proj.bias" in self.shapes
            raw |= {"attention_bias": bias}
        config = ModelConfig.from_hf(raw, self.origin)
        factors = [t for t in self._reader.tensors if t.name == _FREQUENCIES]
        if not factors:
            return config
        values = np.asarray(factors[0].data, dtype=np.float64).ravel()
        if values.shape != (config.head_dim // 2,) or not (values > 0).all():
            raise ValueError(f"{self.origin}: {_FREQUENCIES} is not {config.head_dim // 2} factors")
        scaling = RopeScaling("factors", factors=tuple(values.tolist()))
        return dataclasses.replace(config, rope_scaling=scaling)

    def read(self, name: str, rows: Span, columns: Span | None) -> Iterator[tuple[int, Tensor]]:
        """As `Weights.read`, in float32."""
        import torch

        from .stored import row_blocks

        for start, stop in row_blocks(rows, self.shapes[name]):
            block = self._rows_of(name, self._stored[name], np.arange(start, stop))
            if columns is not None:
                block = block[:, columns.start : columns.stop]
            yield start - rows.start, torch.from_numpy(np.ascontiguousarray(block))

    def _rows_of(self, name: str, tensor: ReaderTensor, rows: np.ndarray) -> np.ndarray:
        from gguf.quants import dequantize

        data = tensor.data[self._permuted(name, rows)]
        return np.asarray(dequantize(data, tensor.tensor_type), dtype=np.float32)

    def _permuted(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Where llama.cpp stores rows: it interleaves the two halves of a head of q and k."""
        match = re.search(r"\.[qk]_proj\.(weight|bias)$", name)
        if self.metadata["general.architecture"] != "llama" or match is None:
            return rows
        from .stored import interleaved_rows

        return interleaved_rows(rows, self.config.head_dim)

    def _rows(self, name: str) -> int | None:
        return self.shapes[name][0] if name in self.shapes else None

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d{1,4})\.)?(\w+)\.(weight|bias)", name)
        known = _NAMES.get(match[2]) if match else None
        if match is None or known is None:
            return name  # which no model has a use for, as loading will say
        layer = "" if match[1] is None else f"model.layers.{int(match[1])}."
        return f"{layer}{known}.{match[3]}"

    def _stop_ids(self) -> list[int]:
        names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        ids = [self.metadata[name] for name in names if name in self.metadata]
        return list(dict.fromkeys(ids))


def _rope_scaling(keys: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    return {"rope_type": kind} | {n: keys.get(f"rope.scaling.{key}") for n, key in names.items()}


def _refuse_others(keys: Mapping[str, Any], origin: str) -> None:
    """Refuse what these architectures may ask for in a gguf and is not computed here."""
    for name in ("expert_count", "expert_used_count", "attention.sliding_window"):
        if keys.get(name):
            raise ValueError(f"{origin}: {name} {keys[name]!r} is not supported")
    if keys.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ValueError(f"{origin}: rope.scaling.attn_factor other than 1 is not supported")
    rotated = keys.get("rope.dimension_count")
    heads, d = keys.get("attention.head_count"), keys.get("embedding_length")
    size = keys.get("attention.key_length")
    if size is None and isinstance(heads, int) and heads and isinstance(d, int):
        size = d // heads
    if rotated is not None and rotated != size:
        raise ValueError(f"{origin}: rope of {rotated} of {size} numbers a head is not supported")
    if keys.get("attention.value_length", size) != size:
        raise ValueError(f"{origin}: values of another size than keys are not supported")


def _opened(path: Path) -> GGUFReader:
    check_regular(path)
    try:
        reader = gguf_reader(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole gguf file ({error})") from None
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in _TYPES:
            raise ValueError(
                f"{path}: tensor {tensor.name!r} is of type {tensor.tensor_type.name}, which is "
                f"not read: only {', '.join(_TYPES)} are"
            )
    return reader

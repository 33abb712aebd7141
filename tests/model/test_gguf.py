"""Models in .gguf files: weights, config and tokenizer against transformers and sentencepiece."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from oracles import hf_model
from tolerances import LOGITS_RELATIVE

from shardlens.model import ModelFiles, Transformer, load_weights
from shardlens.tokenizer import Tokenizer, gguf_tokenizer

D, FFN = 256, 512  # what K-quants need: rows of whole blocks of 256
SIZES = dict(
    hidden_size=D,
    intermediate_size=FFN,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.08,
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# gguf's own Python cannot write K-quants; their bytes are drawn at random instead.
WRITTEN = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]
DRAWN = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]


def gguf_name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{ending}"
    return f"{NAMES[stem]}.{ending}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp's converter stores rows of q and k of a LLaMA."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def drawn(shape: tuple[int, int], kind: Type, seed: int) -> np.ndarray:
    """Random bytes of a K-quant whose scales are small and finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    chance = np.random.default_rng(seed)
    data = chance.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    scale = np.float16(2e-4).tobytes()
    where = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q6_K: (208,)}.get(kind, (0, 2))
    for offset in where:
        data[..., offset : offset + 2] = np.frombuffer(scale, np.uint8)
    return data.reshape(shape[0], -1)


def write_model(path: Path, hf: Any, kind: Type, **extra: Any) -> None:
    """Write `hf` as llama.cpp would, and give it the weights that its types can hold."""
    config, arch = hf.config, hf.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    for key, value in extra.pop("keys", {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    state = hf.state_dict()
    for seed, (name, tensor) in enumerate(state.items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.float().numpy()
        part = name.split(".")[-2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        moved = interleaved(rows, heads[part]) if arch == "llama" and part in heads else rows
        if rows.ndim == 1:
            writer.add_tensor(gguf_name(name), moved)
            continue
        data = drawn(rows.shape, kind, seed) if kind in DRAWN else quantize(moved, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        held = dequantize(data, kind).astype(np.float32)
        if arch == "llama" and part in heads:
            size = rows.shape[0] // heads[part]
            held = held.reshape(heads[part], size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
        tensor.copy_(torch.from_numpy(held))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits_of(path: Path, ids: torch.Tensor, run_ranks: Any, ranks: int) -> torch.Tensor:
    def body(parallel: Any) -> torch.Tensor:
        model = Transformer(ModelFiles(path).config, parallel=parallel)
        load_weights(model, path)
        with torch.no_grad():
            return model.norm(model(ids)) @ model.head.valid_weight.T

    return torch.cat(run_ranks(ranks, body), -1)


def assert_as_transformers(path: Path, hf: Any, run_ranks: Any, ranks: int) -> None:
    ids = torch.randint(3, 509, (2, 19), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = hf(ids).logits
    logits = logits_of(path, ids, run_ranks, ranks)
    assert (logits - expected).abs().max() / expected.abs().max() <= LOGITS_RELATIVE


@pytest.mark.parametrize("kind", WRITTEN + DRAWN, ids=lambda kind: kind.name)
def test_every_type(kind: Type, tmp_path: Path, run_ranks: Any) -> None:
    hf = hf_model("llama-gqa-tied", **SIZES)
    write_model(tmp_path / "m.gguf", hf, kind)
    assert_as_transformers(tmp_path / "m.gguf", hf, run_ranks, ranks=2)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-tied", "qwen2", "qwen3", "qwen3-tied"])
def test_every_family(name: str, ranks: int, tmp_path: Path, run_ranks: Any) -> None:
    """Rows of q and k are interleaved in files of LLaMA alone; biases of Qwen2 come along."""
    kv_heads = 4 if name == "llama-mha" else 2
    hf = hf_model(name, **SIZES | dict(num_key_value_heads=kv_heads, head_dim=64))
    write_model(tmp_path / "m.gguf", hf, Type.Q8_0)
    assert_as_transformers(tmp_path / "m.gguf", hf, run_ranks, ranks)


def test_rope_factors_are_those_of_llama3(tmp_path: Path, run_ranks: Any) -> None:
    """llama.cpp stores what Llama 3.1 divides its frequencies by as a tensor."""
    hf = hf_model("llama3-rope", **SIZES | dict(head_dim=64))
    plain = 1 / 10000 ** (torch.arange(0, 64, 2).float() / 64)
    factors = (plain / hf.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 4
    write_model(tmp_path / "m.gguf", hf, Type.F32, **{"rope_freqs.weight": factors})
    assert_as_transformers(tmp_path / "m.gguf", hf, run_ranks, ranks=1)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"llama.rope.scaling.type": "yarn"}, None),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor"),
        ({"llama.expert_count": 8.0}, "expert_count 8.0"),
        ({"llama.attention.sliding_window": 8.0}, "sliding_window 8.0"),
        ({"llama.rope.dimension_count": 32.0}, "rope of 32.0 of 64"),
    ],
)
def test_what_the_keys_ask_for(keys: dict[str, Any], names: str | None, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", hf_model("llama-gqa-tied", **SIZES), Type.F16, keys=keys)
    if names is None:
        assert ModelFiles(tmp_path / "m.gguf").config.d == D
        return
    with pytest.raises(ValueError, match=names) as caught:
        ModelFiles(tmp_path / "m.gguf").config  # noqa: B018
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_model(whole, hf_model("llama-gqa-tied", **SIZES), Type.Q8_0)
    data, path = whole.read_bytes(), tmp_path / "m.gguf"
    chance = np.random.default_rng(0)
    refused = 0
    for case in range(60):
        broken = bytearray(data)
        if case < 20:
            broken = broken[: int(chance.integers(0, len(data)))]
        else:
            for at in chance.integers(0, 2000, 3):
                broken[at] = int(chance.integers(0, 256))
        path.write_bytes(broken)
        try:
            model = Transformer(ModelFiles(path).config, device="meta")
            load_weights(model.to_empty(device="cpu"), path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
    assert refused > 30


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_gguf_that_is_no_file(kind: str, tmp_path: Path) -> None:
    """Not waited for: of a fifo no reader would ever see the end."""
    path = tmp_path / "m.gguf"
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    with pytest.raises(ValueError, match=r"m\.gguf is not a regular file"):
        ModelFiles(path).config  # noqa: B018


def test_a_sentencepiece_vocabulary_taken_apart(shared_data: Path) -> None:
    path = str(shared_data / "tokenizers/llama2/tokenizer.model")
    library = sentencepiece.SentencePieceProcessor(model_file=path)
    n_ids = library.get_piece_size()

    def kind(id: int) -> int:
        if library.is_unknown(id):
            return 2
        return 3 if library.is_control(id) else 6 if library.is_byte(id) else 1

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [library.id_to_piece(id) for id in range(n_ids)],
        "tokenizer.ggml.scores": [library.get_score(id) for id in range(n_ids)],
        "tokenizer.ggml.token_type": [kind(id) for id in range(n_ids)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours = gguf_tokenizer(metadata, "m.gguf")
    whole = Tokenizer.from_directory(shared_data / "tokenizers/llama2")
    for text in ["", " ", "Hello  world", "naïve 漢字 👩‍💻\x04", "a <s>b</s>", "\t x\n\n"]:
        assert ours.encode_with_spans(text) == whole.encode_with_spans(text)
        assert ours.decode(ours.encode(text)) == whole.decode(whole.encode(text))
    assert (ours.bos_id, ours.eos_id) == (1, 2)


def test_a_byte_level_vocabulary_taken_apart(shared_data: Path) -> None:
    whole = Tokenizer.from_directory(shared_data / "tokenizers/llama3.1-hf")
    import json

    spec = json.loads((shared_data / "tokenizers/llama3.1-hf/tokenizer.json").read_text())
    vocab = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
    special = {t["id"] for t in spec["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if id in special else 1 for id in range(len(tokens))],
        "tokenizer.ggml.merges": [
            m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]
        ],
        "tokenizer.ggml.bos_token_id": 128000,
        "tokenizer.ggml.eos_token_id": 128009,
    }
    ours = gguf_tokenizer(metadata, "m.gguf")
    for text in ["", "Hello  world", "It's 12345\n\n  漢字 👩‍💻", "a<|eot_id|>b", " x\t"]:
        assert ours.encode_with_spans(text) == whole.encode_with_spans(text)
    with pytest.raises(ValueError, match="rule 'mystery': only llama-bpe, qwen2, smollm"):
        gguf_tokenizer(metadata | {"tokenizer.ggml.pre": "mystery"}, "m.gguf")
    with pytest.raises(ValueError, match="kind 'bert'"):
        gguf_tokenizer(metadata | {"tokenizer.ggml.model": "bert"}, "m.gguf")
    with pytest.raises(ValueError, match="no tokens with their types"):
        gguf_tokenizer(metadata | {"tokenizer.ggml.token_type": [1]}, "m.gguf")


def test_stop_ids_and_dtype(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", hf_model("llama-gqa-tied", **SIZES), Type.F16)
    config = ModelFiles(tmp_path / "m.gguf").config
    assert dataclasses.replace(config, eos_token_ids=()) == config
    assert config.dtype == torch.bfloat16

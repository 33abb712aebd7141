"""The packaged model as strangers publish models: with every kind of file beside or inside it."""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file

from shardlens.model import DEMO

CORPUS = ["Anna is cautious, and the bear stands near the barn.", "Hugo puts the key there."] * 8


def copy_of_demo(folder: Path) -> Path:
    return Path(shutil.copytree(DEMO, folder))


def with_index(folder: Path) -> None:
    """One shard under an index."""
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    data = (folder / shard).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    names = [name for name in json.loads(data[8 : 8 + length]) if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    config["chat_template"] = [{"name": "default", "template": "{{ messages[0].content }}"}]
    config["added_tokens_decoder"] = {str(t["id"]): t for t in added}
    path.write_text(json.dumps(config))


def with_jinja(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}\n{% if message.role == 'user' %}\n"
        "{{ message['content'] | trim }}\n{% elif loop.index0 < 3 %}\n{{ message | tojson }}\n"
        "{% else %}{{ raise_exception('no') }}{% endif %}\n{% endfor %}\n"
        "{% set ns = namespace(n=1) %}{% if add_generation_prompt %}Answer:{% endif %}"
    )


def with_merges(folder: Path) -> None:
    """vocab.json, merges.txt and added_tokens.json in place of the tokenizer.json."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    path.write_text(json.dumps(settings))


def with_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())


def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    return model.getvalue()


def write_rank_file(path: Path) -> None:
    """As many ranks as Llama 3 has: the bytes, then pairs and triples of them."""
    bytes_ = [bytes([n]) for n in range(256)]
    pairs = [a + b for a in bytes_ for b in bytes_]
    triples = [a + b"ab" for a in pairs]
    ranks = [*bytes_, *pairs, *triples][:128_000]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    path.write_bytes(b"".join(lines))


def with_adapter(folder: Path) -> Path:
    """A LoRA adapter of two modules in a folder of its own."""
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = dict(peft_type="LORA", r=2, lora_alpha=4, bias="none", use_dora=False)
    settings |= {"use_rslora": False, "alpha_pattern": {"q_proj": 3}, "modules_to_save": []}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, width in (("self_attn.q_proj", 128), ("self_attn.v_proj", 64)):
        stem = f"base_model.model.model.layers.0.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.full((2, 128), 0.01)
        tensors[f"{stem}.lora_B.weight"] = torch.full((width, 2), 0.01)
    save_file(tensors, adapter / "adapter_model.safetensors")
    return adapter


def write_gguf(path: Path, kind: str = "gpt2", **extra: Any) -> None:
    """A model of one layer and random weights, whose vocabulary is bytes and a few words."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    add_vocabulary(writer, kind)
    chance = np.random.default_rng(0)
    n_vocab = 320
    shapes = {"token_embd": (n_vocab, 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (32, 32)}
    shapes |= {"blk.0.ffn_up": (32, 32), "blk.0.ffn_down": (32, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", chance.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, kind: str) -> None:
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        alphabet = sorted(json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"])
        tokens = [token for token in alphabet if len(token) == 1]
        tokens += ["<|bos|>", "an", "na", *(f"<|{n}|>" for n in range(320 - 259))]
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_merges(["a n", "n a"])
        writer.add_bos_token_id(256)
        kinds = [1 if len(token) < 3 else 3 for token in tokens]
    else:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581", "an"]
        tokens += [f"w{n}" for n in range(320 - len(tokens))]
        kinds = [2, 3, 3, *[6] * 256, *[1] * 61]
        writer.add_token_scores([-float(n) for n in range(320)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)

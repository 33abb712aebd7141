"""Checkpoints as people have them: saves of base models, extra tensors, and hostile files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_tensors, expected, is_close, logits
from oracles import hf_model, save
from safetensors.torch import save_file

from shardlens.model import ModelFiles, Transformer, load_weights


def test_a_base_models_save(tmp_path: Path, run_ranks: Any) -> None:
    """Without `model.` before its names, as LlamaModel and Qwen3-Embedding are saved."""
    hf = hf_model("llama-gqa-tied")
    directory = save(hf.model, tmp_path / "m")
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert is_close(logits(ModelFiles(directory), run_ranks), expected(hf))
    untied = save(hf_model("llama-mha").model, tmp_path / "untied")
    with pytest.raises(ValueError, match=r"lacks tensor lm_head.weight"):
        load_weights(Transformer(ModelFiles(untied).config), untied)


EXTRAS = [
    "v_head.summary.weight",
    "model.layers.0.self_attn.k_scale",
    "model.layers.0.self_attn.attn.v_scale",
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.layers.2.self_attn.masked_bias",
]
NOT_EXTRAS = [
    "model.layers.9.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_scale",
    "score.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "_orig_mod.model.norm.weight",
    "visual.v_head.weight",
]


def test_tensors_that_no_layer_computes_with(tmp_path: Path, run_ranks: Any) -> None:
    hf = hf_model("llama-mha")
    directory = save(hf, tmp_path / "m")
    change_tensors(directory, lambda t: t.update({name: torch.ones(3) for name in EXTRAS}))
    assert is_close(logits(ModelFiles(directory), run_ranks), expected(hf))
    for name in NOT_EXTRAS:
        other = save(hf, tmp_path / name)
        change_tensors(other, lambda t, name=name: t.update({name: torch.ones(3)}))
        with pytest.raises(ValueError, match=rf"holds tensor {name}, which the model has no use"):
            logits(ModelFiles(other), run_ranks, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_head_stored_beside_the_tied_embedding(
    ranks: int, tmp_path: Path, run_ranks: Any
) -> None:
    """Engines differ about which of the two counts: the same is taken, another is refused."""
    hf = hf_model("llama-gqa-tied")
    directory = save(hf, tmp_path / "m")
    embed = hf.model.embed_tokens.weight.detach()
    change_tensors(directory, lambda t: t.update({"lm_head.weight": embed.clone()}))
    assert is_close(logits(ModelFiles(directory), run_ranks, ranks), expected(hf))
    other = embed.clone()
    other[508, 3] += 0.1  # in the last rank's part
    change_tensors(directory, lambda t: t.update({"lm_head.weight": other}))
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but lm_head.weight is stored"):
        logits(ModelFiles(directory), run_ranks, ranks)


@pytest.mark.parametrize(
    "dtype", [torch.int16, torch.uint16, torch.int8, torch.bool, torch.float8_e5m2, torch.int64]
)
def test_what_is_no_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    """16-bit whole numbers have the size of bfloat16, and would be cast to garbage."""
    directory = save(hf_model("llama-mha"), tmp_path / "m")
    change_tensors(directory, lambda t: t.update({"model.norm.weight": torch.ones(48).to(dtype)}))
    with pytest.raises(ValueError, match=r"tensor model.norm.weight .* is of type .* no weight"):
        ModelFiles(directory).weights()


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", None, 3, [], {}, True],
)
def test_an_index_stays_in_its_folder(file: Any, tmp_path: Path) -> None:
    directory = save(hf_model("llama-mha"), tmp_path / "m")
    (directory / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": file}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"which is not the name of a file beside the index"):
        ModelFiles(directory).weights()


def test_a_single_file_beside_an_index(tmp_path: Path) -> None:
    directory = save(hf_model("llama-mha"), tmp_path / "m", shards=True)
    assert ModelFiles(directory).weights().shapes
    save_file({"model.norm.weight": torch.ones(48)}, directory / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"holds both model.safetensors and model.safetensors.index"
    ):
        ModelFiles(directory).weights()


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    directory = save(hf_model("llama-mha"), tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle: take a revision"):
        ModelFiles(directory).weights()


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_weights_file_that_is_none(kind: str, tmp_path: Path) -> None:
    directory = save(hf_model("llama-mha"), tmp_path / "m")
    path = directory / "model.safetensors"
    path.unlink()
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    with pytest.raises(ValueError, match=r"is not a regular file"):
        ModelFiles(directory).weights()

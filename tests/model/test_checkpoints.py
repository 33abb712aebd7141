"""Checkpoints as people have them: adapters, FP8, saves of base models, extra and hostile files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import hf_model, save
from safetensors.torch import load_file, save_file
from tolerances import EFFECT, LOGITS_RELATIVE
from torch import Tensor

from shardlens.model import ModelFiles, Transformer, load_weights

IDS = torch.randint(3, 509, (2, 17), generator=torch.Generator().manual_seed(4))


def logits(files: ModelFiles, run_ranks: Any, ranks: int = 2) -> Tensor:
    def body(parallel: Any) -> Tensor:
        model = Transformer(files.config, parallel=parallel)
        load_weights(model, files.weights())
        with torch.no_grad():
            return model.norm(model(IDS)) @ model.head.valid_weight.T

    return torch.cat(run_ranks(ranks, body), -1)


def expected(hf: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = hf(IDS).logits
    return out


def is_close(ours: Tensor, theirs: Tensor, factor: float = 1.0) -> bool:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    return bool(error <= factor * LOGITS_RELATIVE)


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# LoRA

CHANGED = {
    "model.layers.0.self_attn.q_proj": (48, 48),
    "model.layers.1.self_attn.k_proj": (48, 48),
    "model.layers.1.self_attn.o_proj": (48, 48),
    "model.layers.2.mlp.gate_proj": (100, 48),
    "model.layers.2.mlp.down_proj": (48, 100),
    "lm_head": (509, 48),
}


def write_adapter(directory: Path, hf: Any, **config: Any) -> None:
    """A LoRA of rank 3 as PEFT writes it, also added to `hf` in float64."""
    directory.mkdir()
    settings = dict(peft_type="LORA", r=3, lora_alpha=6, bias="none", use_dora=False) | config
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    generator, tensors = torch.Generator().manual_seed(7), {}
    state = hf.state_dict()
    for module, (n_out, n_in) in CHANGED.items():
        a = 0.3 * torch.randn(3, n_in, generator=generator)
        b = 0.3 * torch.randn(n_out, 3, generator=generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        alpha = settings.get("alpha_pattern", {}).get("q_proj", 6) if "q_proj" in module else 6
        scale = alpha / (math.sqrt(3) if settings.get("use_rslora") else 3)
        weight = state[f"{module}.weight"]
        weight.copy_(weight.double() + scale * (b.double() @ a.double()))
    a = 0.3 * torch.randn(3, 509, generator=generator)
    b = 0.3 * torch.randn(48, 3, generator=generator)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = a
    tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = b
    embed = state["model.embed_tokens.weight"]
    embed.copy_(embed + 6 / (math.sqrt(3) if settings.get("use_rslora") else 3) * (b @ a).T)
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 12}, "modules_to_save": []}]
)
def test_an_adapter_is_added(
    config: dict[str, Any], ranks: int, tmp_path: Path, run_ranks: Any
) -> None:
    hf = hf_model("llama-mha")
    base = save(hf, tmp_path / "base")
    before = expected(hf)
    write_adapter(tmp_path / "adapter", hf, **config)
    after = expected(hf)
    assert not is_close(before, after, EFFECT)
    assert is_close(logits(ModelFiles(base, tmp_path / "adapter"), run_ranks, ranks), after)
    assert is_close(logits(ModelFiles(base), run_ranks, ranks), before)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'"),
        ({"lora_alpha": None}, "lacks lora_alpha"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "only the ends of names"),
    ],
)
def test_an_adapter_of_another_kind(config: dict[str, Any], names: str, tmp_path: Path) -> None:
    hf = hf_model("llama-mha")
    base = save(hf, tmp_path / "base")
    write_adapter(tmp_path / "adapter", hf)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=names):
        ModelFiles(base, tmp_path / "adapter").weights()


@pytest.mark.parametrize(
    ("name", "tensor", "names"),
    [
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", (3, 48), "lacks A"),
        ("base_model.model.lm_head.weight", (509, 48), "neither A nor B"),
        ("base_model.model.lm_head.lora_A.weight", (3, 47), r"'lm_head.weight' of shape"),
        ("base_model.model.lm_head.lora_A.weight", (2, 48), "lacks A .* of one r"),
    ],
)
def test_an_adapter_that_does_not_fit(
    name: str, tensor: tuple[int, int], names: str, tmp_path: Path
) -> None:
    hf = hf_model("llama-mha")
    base = save(hf, tmp_path / "base")
    write_adapter(tmp_path / "adapter", hf)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(tensor)}, path)
    with pytest.raises(ValueError, match=names):
        ModelFiles(base, tmp_path / "adapter").weights()


def test_an_adapter_that_nobody_asked_for(tmp_path: Path) -> None:
    hf = hf_model("llama-mha")
    write_adapter(tmp_path / "alone", hf, base_model_name_or_path="meta/x")
    with pytest.raises(
        ValueError, match=r"adapter alone: give its base model .'meta/x'.* --adapter"
    ):
        ModelFiles(tmp_path / "alone")
    beside = save(hf, tmp_path / "alone")
    with pytest.raises(ValueError, match=r"adapter_config.json beside a model: give --adapter"):
        ModelFiles(beside)
    assert ModelFiles(beside, beside).weights().shapes


# FP8


def to_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(FP8 numbers, scales of their blocks, what they stand for)."""
    n_rows, n_columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    scales = torch.zeros(n_rows, n_columns)
    stored, held = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), torch.zeros_like(weight)
    for row in range(n_rows):
        for column in range(n_columns):
            part = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scales[row, column] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scales[row, column]).to(torch.float8_e4m3fn)
            held[part] = stored[part].float() * scales[row, column]
    return stored, scales, held


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("block", [(16, 32), (128, 128), (7, 9)])
def test_fp8_with_scales_of_blocks(
    block: tuple[int, int], ranks: int, tmp_path: Path, run_ranks: Any
) -> None:
    """As Qwen3-FP8 stores it; blocks that no rank's slice begins or ends with."""
    hf = hf_model("qwen3", num_key_value_heads=4)
    directory = save(hf, tmp_path / "m")
    exact = expected(hf)

    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            stored, scales, held = to_fp8(tensors[name], block)
            tensors[name], tensors[f"{name}_scale_inv"] = stored, scales
            hf.state_dict()[name].copy_(held)

    change_tensors(directory, quantise)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    change_config(directory, quantization_config=quantization)
    ours, theirs = logits(ModelFiles(directory), run_ranks, ranks), expected(hf)
    assert is_close(ours, theirs) and not is_close(exact, theirs, EFFECT)


def test_fp8_without_its_scales(tmp_path: Path) -> None:
    directory = save(hf_model("qwen3"), tmp_path / "m")
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(directory, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"up_proj.weight .* is of type F8_E4M3"):
        ModelFiles(directory).weights()
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    change_config(directory, quantization_config=quantization)
    with pytest.raises(ValueError, match=r"up_proj.weight_scale_inv are not of shape \[1, 1\]"):
        ModelFiles(directory).weights()
    for method in ("awq", "gptq", "bitsandbytes", "compressed-tensors", "fp8"):
        change_config(directory, quantization_config={"quant_method": method})
        with pytest.raises(ValueError, match=rf"quantised by '{method}'"):
            ModelFiles(directory).config  # noqa: B018


# Names and files


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


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_weights_file_that_is_none(kind: str, tmp_path: Path) -> None:
    directory = save(hf_model("llama-mha"), tmp_path / "m")
    path = directory / "model.safetensors"
    path.unlink()
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    with pytest.raises(ValueError, match=r"is not a regular file"):
        ModelFiles(directory).weights()

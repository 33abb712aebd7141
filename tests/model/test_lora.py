"""LoRA adapters of PEFT, added to the weights while they are read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import expected, is_close, logits
from oracles import hf_model, save
from safetensors.torch import load_file, save_file
from tolerances import EFFECT

from shardlens.model import ModelFiles

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
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"r": 4}, "an r of 4, where its A and B have 3"),
        ({"r": "3"}, "r is '3', not a whole number"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj' an r of 2, where its A and B have 3"),
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

"""FP8 weights with a scale per block, as Qwen3-FP8 has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_config, change_tensors, expected, is_close, logits
from oracles import hf_model, save
from tolerances import EFFECT
from torch import Tensor

from shardlens.model import ModelFiles


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

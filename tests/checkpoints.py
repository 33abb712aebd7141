"""Saved models changed on disk, and their logits here and in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tolerances import LOGITS_RELATIVE
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

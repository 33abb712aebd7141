"""From a name to a running model: a directory, a Hugging Face hub id, or "demo"."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..parallel.collectives import agreed
from ..parallel.group import TensorParallel, default_device_type
from .config import DEMO, ModelConfig, hub_errors, read_json, token_id_tuple
from .tokenizer import Tokenizer
from .transformer import Transformer
from .weights import load_weights

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def load(
    source: str | Path,
    *,
    parallel: TensorParallel | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check: Callable[[ModelConfig, Tokenizer], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of `source`, this rank's share of it.

    source: "demo", a directory in Hugging Face layout, or a hub id such as "Qwen/Qwen3-4B".
    dtype defaults to the checkpoint's, device to this rank's CUDA device where there is one.
    check(config, tokenizer) may raise ValueError before any memory is taken for weights.
    on_progress(done, total) counts parameters filled. The tokenizer is also `model.tokenizer`.
    If any rank fails, every rank raises: ValueError for whatever is wrong with the files.
    """
    parallel = parallel if parallel is not None else TensorParallel.single()
    directory = resolve(source, parallel)
    with agreed(parallel):
        config = read_config(directory)
        tokenizer = Tokenizer.from_directory(directory)
        if check is not None:
            check(config, tokenizer)
    # On its own: a rank that took memory already would leave the others less of it to check.
    with agreed(parallel):
        model = Transformer(
            config,
            parallel=parallel,
            dtype=dtype or config.dtype,
            device="meta",
        )
        model.to_empty(device=default_device() if device is None else torch.device(device))
        load_weights(model, directory, on_progress=on_progress)
    model.eval().requires_grad_(False)
    model.tokenizer = tokenizer
    return model, tokenizer


def default_device() -> torch.device:
    if default_device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def resolve(source: str | Path, parallel: TensorParallel) -> Path:
    """The local directory of `source`, downloading a hub id once per machine."""
    if str(source) == "demo":
        return DEMO
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    # The first rank of every machine downloads; the others then find the files in its cache.
    first = int(os.environ.get("LOCAL_RANK", parallel.rank)) == 0
    found = None
    with agreed(parallel):
        found = _download(str(source)) if first else None
    with agreed(parallel):
        found = found or _download(str(source))
    return found


def _download(hub_id: str) -> Path:
    with hub_errors(hub_id):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))


def read_config(directory: Path) -> ModelConfig:
    """config.json, with the stop tokens of generation_config.json where there is one."""
    config = ModelConfig.from_hf(directory / "config.json")
    generation = directory / "generation_config.json"
    if not generation.exists():
        return config
    stop_ids = token_id_tuple(read_json(generation).get("eos_token_id"))
    return dataclasses.replace(config, eos_token_ids=stop_ids or config.eos_token_ids)

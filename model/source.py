"""From the name of a model to its files: a directory, a Hugging Face hub id, or "demo"."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..tokenizer.json_file import read_json
from .config import ModelConfig, token_id_tuple

if TYPE_CHECKING:
    from ..parallel.group import TensorParallel

DEMO = Path(__file__).parent / "demo"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def find_model(source: str | Path, parallel: TensorParallel) -> Path:
    """The directory with the files of `source`; a hub id is downloaded once per machine.

    Raises ValueError, on every rank, for what is none of the three and for a failed download.
    """
    from ..parallel.collectives import agreed

    local = _local(source)
    if local is not None:
        return local
    # The first rank of every machine downloads; the others then find the files in its cache.
    first = int(os.environ.get("LOCAL_RANK", parallel.rank)) == 0
    found = None
    with agreed(parallel):
        found = _download(str(source)) if first else None
    with agreed(parallel):
        found = found or _download(str(source))
    return found


def find_config(source: str | Path) -> Path:
    """The config.json of `source`; of a hub id nothing else is fetched.

    A path to such a file stands for itself. Raises ValueError as `find_model` does.
    """
    local = _local(source)
    if local is not None:
        return local / "config.json"
    path = Path(source).expanduser()
    if path.is_file():
        return path
    with _hub_errors(str(source)):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(str(source), "config.json"))


def read_config(directory: Path) -> ModelConfig:
    """config.json, with the stop tokens of generation_config.json where there is one."""
    config = ModelConfig.from_hf(directory / "config.json")
    generation = directory / "generation_config.json"
    if not generation.exists():
        return config
    stop_ids = token_id_tuple(read_json(generation).get("eos_token_id"))
    return dataclasses.replace(config, eos_token_ids=stop_ids or config.eos_token_ids)


def _local(source: str | Path) -> Path | None:
    if str(source) == "demo":
        return DEMO
    directory = Path(source).expanduser()
    return directory if directory.is_dir() else None


def _download(hub_id: str) -> Path:
    with _hub_errors(hub_id):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """For a block that fetches from the hub: whatever goes wrong there is a ValueError.

    So is a `source` that cannot be a hub id, before anything is asked of the hub.
    """
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is None:
        raise ValueError(f"{source} is not a directory, a hub id such as Qwen/Qwen3-4B, or demo")
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{source} is no local directory and could not be fetched from the hub: {reason}"
        ) from None

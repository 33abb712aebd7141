"""From the name of a model to its files: a directory, a .gguf file, a hub id, a packaged name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..tokenizer.paths import user_path
from .config import ModelConfig
from .model_files import ModelFiles
from .packaged import PACKAGED, packaged_path

if TYPE_CHECKING:
    from ..parallel.group import TensorParallel

DEMO = Path(__file__).parent / "demo"
# Of a hub repository's top folder, beside the weights.
_SMALL_FILES = ["*.json", "*.model", "*.jinja", "merges.txt"]
_BELOW = ["*/*"]


def find_model(
    source: str | Path,
    parallel: TensorParallel,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
) -> ModelFiles:
    """The files of `source`; a hub id is downloaded once per machine.

    revision: a branch, tag or commit of a hub id. adapter: a folder on this machine with a LoRA
    adapter of PEFT in safetensors. Raises ValueError, on every rank, for anything
    else and for a failed download.
    """
    from ..parallel.agreement import waiting_long
    from ..parallel.collectives import agreed

    found = None
    with agreed(parallel):
        if not isinstance(source, str | Path):
            raise ValueError(
                f"a model of type {type(source).__name__}: give a name, or the path of its files"
            )
        local, added = _local(source, revision), _adapter(adapter)
        found = None if local is None else ModelFiles(local, added)
    if found is not None:
        return found
    # The first rank of every machine downloads; the others then find the files in its cache.
    first = int(os.environ.get("LOCAL_RANK", parallel.rank)) == 0
    with waiting_long(parallel), agreed(parallel):
        path = _download(str(source), revision) if first else None
    with waiting_long(parallel), agreed(parallel):
        found = ModelFiles(path or _download(str(source), revision), added)
    return found


def find_config(source: str | Path, *, revision: str | None = None) -> ModelConfig:
    """The config of `source`; of a hub id nothing else is fetched.

    source: as of `find_model`, or the path of a config.json. Raises ValueError as `find_model`
    does.
    """
    local, path = _local(source, revision), user_path(source)
    if local is not None:
        return ModelFiles(local).config
    if path.is_file():
        return ModelConfig.from_hf(path)
    with _hub_errors(str(source)):
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(str(source), "config.json", revision=revision)
    return ModelConfig.from_hf(Path(file))


def _local(source: str | Path, revision: str | None) -> Path | None:
    name = str(source)
    packaged = DEMO if name == "demo" else packaged_path(name)
    path = packaged or user_path(source)
    is_local = path.is_dir() or (path.suffix == ".gguf" and path.exists())
    if is_local and revision is not None:
        raise ValueError(f"{source} is on this machine: a revision is of a hub id")
    return path if is_local else None


def _adapter(given: str | Path | None) -> Path | None:
    path = None if given is None else user_path(given)
    if path is not None and not path.is_dir():
        raise ValueError(
            f"adapter {given} is not a directory; give the one with adapter_config.json"
        )
    return path


def _download(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub id's files: those beside the weights, then the weights of the index."""
    with _hub_errors(hub_id):
        from huggingface_hub import snapshot_download

        def fetch(patterns: list[str]) -> Path:
            return Path(
                snapshot_download(
                    hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=_BELOW
                )
            )

        folder = fetch(_SMALL_FILES)
        return fetch([*_SMALL_FILES, *_weight_files(folder)])


def _weight_files(folder: Path) -> list[str]:
    from .safetensors_files import INDEX, SINGLE, weight_files

    index = folder / INDEX
    return sorted(set(weight_files(index).values())) if index.exists() else [SINGLE]


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """For a block that fetches from the hub: whatever goes wrong there is a ValueError.

    So is a `source` that cannot be a hub id, before the hub is asked.
    """
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is None or len(source) > 200:
        raise ValueError(
            f"{source[:200]} is not a directory, a .gguf file, a hub id such as Qwen/Qwen3-4B, "
            f"demo or {' or '.join(PACKAGED)}"
        )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{source} is not a local directory and could not be fetched from the hub: {reason}"
        ) from None

"""Folders as torch.distributed.checkpoint writes them, with a config.json beside."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from shardlens.model import ModelFiles


def write(states: dict[str, Any], folder: Path, beside: Path) -> Path:
    """Save states from this process alone; `beside` has the model's config.json."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.distributed is not initialised
        dcp.save(states, checkpoint_id=folder, no_dist=True)
    shutil.copy(beside / "config.json", folder)
    return folder


def change_metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a folder holds, read through its `Weights`."""
    from shardlens.parallel import Span

    weights, found = ModelFiles(folder).weights(), {}
    for name, shape in weights.shapes.items():
        rows, *other = (Span(0, size, size, size) for size in shape)
        ((_, found[name]),) = weights.read(name, rows, other[0] if other else None)
    return found

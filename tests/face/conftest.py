"""Fixtures for the commands: the prompts that they make, and a vector for the packaged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardlens
from shardlens.model import Tap


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of the requests that commands make, as they make them."""
    generate, seen = shardlens.LanguageModel.generate, []

    def called(self: Any, asked: Any, **options: Any) -> Any:
        seen.extend(list(each.prompt) for each in (asked if isinstance(asked, list) else [asked]))
        return generate(self, asked, **options)

    monkeypatch.setattr(shardlens.LanguageModel, "generate", called)
    return seen


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    """A file with a vector for one layer of the packaged model."""
    path = tmp_path / "ones.safetensors"
    shardlens.SteeringVectors({Tap(1, "resid_post"): torch.ones(128)}, {}, n_layers=6).save(path)
    return path

"""Megatron's output layer, read and trained through by its slices."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import environment
from gloo import on_ranks

WORKER = Path(__file__).with_name("megatron_rank.py")
ERROR = 5e-5  # nats; logits are of size 20, in float32


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_megatron(size: int, tmp_path: Path) -> None:
    found = on_ranks(WORKER, size, tmp_path / "store", variables=environment("megatron"))
    assert len(found) == size
    for each in found:
        assert each["error"] < ERROR and each["ids"] and each["ranks"], each

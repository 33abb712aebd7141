"""Sharded layers, a block, and a model with its loss under torch.compile(fullgraph=True)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gloo import on_ranks
from tolerances import EFFECT, GRADIENT_RELATIVE

WORKER = Path(__file__).with_name("compiled_rank.py")


def check(found: list[dict[str, Any]], size: int) -> None:
    """One graph with the numbers of the eager run, which without the exchange would be others."""
    for each in found:
        assert each["graphs"] == 1
        assert each["error"] <= GRADIENT_RELATIVE
        if size > 1:
            assert each["error_without_exchange"] > EFFECT * GRADIENT_RELATIVE


def test_layers_and_a_block_on_two_ranks(tmp_path: Path) -> None:
    found = on_ranks(WORKER, 2, tmp_path / "store", "layers", "block")
    assert [each["case"] for each in found] == ["layers", "block"] * 2
    check(found, 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_model_and_its_loss(size: int, tmp_path: Path) -> None:
    found = on_ranks(WORKER, size, tmp_path / "store", "layers", "block", "training_loss")
    assert len(found) == 3 * size
    check(found, size)

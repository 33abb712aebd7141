"""Sharded layers, a block, and a model with its loss under torch.compile(fullgraph=True)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tolerances import EFFECT, GRADIENT_RELATIVE

WORKER = Path(__file__).with_name("compiled_rank.py")


def on_ranks(size: int, store: Path, *cases: str) -> list[dict[str, Any]]:
    """The findings of each rank, a process that talks gloo, for each case."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(size), str(store), *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), outputs[0][1] or outputs[-1][1]
    return [json.loads(line) for stdout, _ in outputs for line in stdout.splitlines()]


def check(found: list[dict[str, Any]], size: int) -> None:
    """One graph with the numbers of the eager run, which without the exchange would be others."""
    for each in found:
        assert each["graphs"] == 1
        assert each["error"] <= GRADIENT_RELATIVE
        if size > 1:
            assert each["error_without_exchange"] > EFFECT * GRADIENT_RELATIVE


def test_layers_and_a_block_on_two_ranks(tmp_path: Path) -> None:
    found = on_ranks(2, tmp_path / "store", "layers", "block")
    assert [each["case"] for each in found] == ["layers", "block"] * 2
    check(found, 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_model_and_its_loss(size: int, tmp_path: Path) -> None:
    found = on_ranks(size, tmp_path / "store", "layers", "block", "training_loss")
    assert len(found) == 3 * size
    check(found, size)

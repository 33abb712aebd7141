"""Distributed checkpoints between FSDP2 on four processes and shardlens on other rank counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gloo import on_ranks
from tolerances import EFFECT, LOGITS_RELATIVE

WORKER = Path(__file__).parent / "dcp_rank.py"
RANKS = 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3-rope", "qwen3-tied", "llama-9-heads"])
def test_fsdp2_saves_for_us_and_loads_of_us(name: str, tmp_path: Path) -> None:
    """The logits of transformers in one process, whoever saved and whoever loaded."""
    lines = on_ranks(WORKER, RANKS, tmp_path / "store", str(tmp_path), name)
    by_step: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line)
    ranks = {step: len(found) for step, found in by_step.items()}
    assert ranks == {
        "saved by FSDP2": 4,
        "read on 1": 1,
        "read on 2": 2,
        "read on 3": 3,
        "ours on 2": 2,
        "ours on 3": 3,
        "FSDP2 from ours on 2": 4,
        "FSDP2 from ours on 3": 4,
        "read from ours on 2": 4,
        "read from ours on 3": 4,
    }
    for line in lines:
        assert line["error"] <= LOGITS_RELATIVE, line
        assert line.get("before", 1.0) > EFFECT * LOGITS_RELATIVE, line
        assert line.get("same", True), line
    assert by_step["ours on 3"][0]["kinds"] == ["DTensor", "PiecedTensor"]

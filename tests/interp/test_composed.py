"""A monitor in a training that composes what trainings compose: the training is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from gloo import on_ranks

WORKER = Path(__file__).with_name("composed_rank.py")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_twenty_steps_with_and_without_a_monitor(size: int, tmp_path: Path) -> None:
    """FSDP2 x tensor parallelism, compiled and checkpointed blocks, gradient accumulation."""
    found = on_ranks(WORKER, size, tmp_path / "store")
    assert len(found) == size
    for rank, each in enumerate(found):
        assert each["same"], each
        assert each["steps"] == ([n for n in range(0, 20, 5) for _ in "ab"] if rank == 0 else [])
        assert each["graphs"] == each["plain_graphs"] and each["graphs"][0] > 0, each
    assert found[0]["losses"][-1] < found[0]["losses"][0]

"""Metrics of ranks that hold copies of a model and other texts are those of all texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from gloo import on_ranks

WORKER = Path(__file__).with_name("replicated_rank.py")


@pytest.mark.slow
def test_replicated_and_compiled(tmp_path: Path) -> None:
    tests = str(Path(__file__).resolve().parents[1])
    first, second = on_ranks(WORKER, 2, tmp_path / "store", variables={"PYTHONPATH": tests})
    assert second["replicated"] == second["compiled"] == []  # one rank writes
    (expected,) = first["alone"]
    for name in ("replicated", "compiled"):
        (found,) = first[name]
        for field in ("loss", "entropy", "kl_to_final", "leads", "norm", "sink"):
            assert found[field] == pytest.approx(expected[field], abs=1e-5), (name, field)

"""torchtitan's own model and parallel plan, read, steered and monitored from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import environment
from gloo import on_ranks

WORKER = Path(__file__).with_name("titan_rank.py")
ERROR = 5e-5  # logits and states of size 1 to 10, in float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, tp, sequence", [(2, 1, 0), (2, 2, 1), (4, 2, 1), (4, 2, 0)], ids=str
)
def test_torchtitan(size: int, tp: int, sequence: int, tmp_path: Path) -> None:
    """FSDP2, tensor parallelism with and without sequence parallelism, and both together."""
    tests = str(Path(__file__).resolve().parents[1])
    variables = environment("torchtitan")
    variables["PYTHONPATH"] += f":{tests}"
    words = (str(tp), str(sequence))
    found = on_ranks(WORKER, size, tmp_path / "store", *words, variables=variables)
    assert len(found) == 8 * size
    for each in found:
        if each["case"] in ("states", "logits", "lens", "head_row"):
            assert each["error"] < ERROR, each
        assert each.get("ids", True), each
        if each["case"] == "steered":
            assert each["error"] < ERROR and each["effect"] > 0.05, each
            assert each["untouched"] == 0, each
        if each["case"] == "hooks":
            assert each["left"] == 0, each
        if each["case"] == "stage":
            alone, lent = each["metrics"]
            assert alone["layers"] == lent["layers"] == [0, 1, 2]
            assert alone["loss"] == [None] * 3 and min(alone["norm"]) > 0
            assert min(lent["loss"]) > 5 and lent["kl_to_final"] == [None] * 3, each
        if each["case"] == "monitor":
            assert each["same"], each
            assert [m["step"] for m in each["metrics"]] == (
                [0, 0, 10, 10] if each["rank"] == 0 else []
            )

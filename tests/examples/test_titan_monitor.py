"""The example for torchtitan, in the step of torchtitan's trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import environment
from gloo import on_ranks

ROOT = Path(__file__).resolve().parents[2]
SAME_LOSS = 1e-5  # nats


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_step_of_a_trainer(tensor_parallel: int, tmp_path: Path) -> None:
    """The last layer's loss of all positions is the trainer's, over all texts."""
    variables = environment("torchtitan")
    for folder in ("tests", "tests/interp", "examples"):
        variables["PYTHONPATH"] += f":{ROOT / folder}"
    worker = Path(__file__).with_name("titan_trainer_rank.py")
    store = tmp_path / "store"
    first, second = on_ranks(worker, 2, store, str(tensor_parallel), variables=variables)
    assert [each["step"] for each in first["found"]] == [2, 4] and not second["found"]
    for each in first["found"]:
        ranks = (first,) if tensor_parallel == 2 else (first, second)
        loss = sum(rank["losses"][each["step"] - 1] for rank in ranks)
        assert abs(each["loss"][-1] - loss) < SAME_LOSS
        assert abs(each["loss"][0] - loss) > 100 * SAME_LOSS

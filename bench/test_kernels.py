"""The kernels under pytest-benchmark: `pytest bench --benchmark-only`.

One shape of the grid for each operation and variant, every arm; the whole grid, with roofline and
memory, is `./launch.sh bench kernels`. Here, too, an arm is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shardlens.bench import rivals
from shardlens.bench.kernel_arms import BY_NAME, COMPILED, DTYPES, EAGER, OURS
from shardlens.bench.kernel_checks import Checker
from shardlens.bench.kernels import arms_of
from shardlens.bench.shapes import Case, cases
from shardlens.bench.timing import one_thread, synchronize
from shardlens.model.load import default_device

DEVICE = default_device()
ROUNDS = {"cuda": 50, "cpu": 3}


def chosen() -> Iterator[Any]:
    """(case, arm): of each operation and variant the first shape, which has the fewest rows."""
    grid = "full" if DEVICE.type == "cuda" else "small"
    first: dict[str, Case] = {}
    for case in cases(grid, dtype=DTYPES[DEVICE.type]):
        first.setdefault(f"{case.op} {case.variant}", case)
    for name, case in first.items():
        others = [*BY_NAME[case.op].more_arms(case), *rivals.names_of(case.op, case.variant)]
        for arm in (OURS, EAGER, COMPILED, *others):
            yield pytest.param(case, arm, id=f"{name.strip()}-{arm}")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread(), torch.no_grad():
        yield


@pytest.mark.parametrize("case, arm", list(chosen()))
def test_kernel(benchmark: Any, case: Case, arm: str) -> None:
    run = arms_of(case, DEVICE, compiled=arm == COMPILED).get(arm)
    if run is None:
        pytest.skip(f"{arm} is not installed, or needs CUDA")
    given = BY_NAME[case.op].make(case, DEVICE)
    assert Checker(case, given).problem(arm, run) is None
    cost = BY_NAME[case.op].cost(case)
    benchmark.group = case.label
    benchmark.extra_info.update(
        bytes=cost.bytes, operations=cost.operations, device=DEVICE.type, used_by=case.used_by
    )

    def once() -> None:
        run(given)
        synchronize(DEVICE)

    benchmark.pedantic(once, rounds=ROUNDS[DEVICE.type], warmup_rounds=1)

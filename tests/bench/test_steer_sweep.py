"""The benchmark of the one-pass sweep on a small model: its check can fail, rows are counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardlens.bench import report, steer_sweep
from shardlens.bench.models import random_model
from shardlens.bench.steer_sweep import (
    EFFECT,
    IMPLS,
    NATS,
    ONE_PASS,
    SEPARATE,
    SHAPE,
    Sweep,
    SweepShape,
    claims,
    counted_rows,
    print_result,
    problem,
)
from shardlens.bench.timing import Rates
from shardlens.cli import main
from shardlens.interp import MULTIPLIERS
from shardlens.model import Transformer
from shardlens.parallel import TensorParallel

CPU = torch.device("cpu")
TINY = SweepShape(n_layers=3, d=32, n_heads=4, ffn=64, vocab=101, prompt_tokens=12)
N_VARIANTS = 3 * len(MULTIPLIERS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that it takes to measure the machine."""
    monkeypatch.setattr(steer_sweep, "measured_rates", lambda *_: Rates(1e9, 1e9))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(TINY.config(), TensorParallel.single(), torch.float32, CPU)


def test_rows_are_counted(model: Transformer) -> None:
    """The prompt once and a row per variant; the prompt for each variant."""
    sweep = Sweep.random(TINY, CPU)
    found, n_rows = counted_rows(IMPLS[ONE_PASS], model, sweep)
    expected, n_separate_rows = counted_rows(IMPLS[SEPARATE], model, sweep)
    assert (n_rows, n_separate_rows) == (11 + N_VARIANTS, 12 * N_VARIANTS)
    assert found.shape == expected.shape == (3, len(MULTIPLIERS))
    assert problem(found, expected) is None
    assert counted_rows(IMPLS[ONE_PASS], model, sweep)[1] == n_rows  # the last count has ended


def test_a_red_check_is_refused(quick: None) -> None:
    """Other numbers, no numbers, and steering that does nothing."""

    def slightly_off(model: Transformer, sweep: Sweep) -> Tensor:
        found = IMPLS[ONE_PASS](model, sweep)
        found[1, 2] += 2 * NATS
        return found

    def unsteered(model: Transformer, sweep: Sweep) -> Tensor:
        return torch.ones(3, len(MULTIPLIERS), dtype=torch.float64)

    for impls, message in (
        ({**IMPLS, ONE_PASS: slightly_off}, "of the one pass are 2e-05 nats off"),
        ({**IMPLS, ONE_PASS: unsteered}, "nats off"),
        ({name: unsteered for name in IMPLS}, "moves its propensity by at most 0 nats"),
    ):
        with pytest.raises(ValueError, match=f"a check is red, nothing is measured: .*{message}"):
            steer_sweep.steer_sweep(2, CPU, TINY, impls)
    curves = torch.tensor(MULTIPLIERS, dtype=torch.float64).expand(3, -1) * EFFECT
    assert problem(curves, curves) is None
    assert "nan nats off" in str(problem(curves * math.nan, curves))
    with_idle_layer = curves * torch.tensor([[1.0], [0.5], [1.0]])
    assert "by at most 7.5e-05 nats" in str(problem(with_idle_layer, with_idle_layer))


def test_a_whole_run(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    result = steer_sweep.steer_sweep(3, CPU, TINY)
    json.dumps(result)
    print_result(result)
    printed = capsys.readouterr().out
    assert "checks: green" in printed and "no target" in printed
    assert result["variants"] == N_VARIANTS and 0 <= result["largest_difference_nats"] <= NATS
    joint, separate = (result["impls"][name] for name in (ONE_PASS, SEPARATE))
    assert result["rows_ratio"] == separate["rows"] / joint["rows"] == 12 * 21 / 32
    # q, k, v, o: 4 d²; gate, up, down: 3 d f
    assert joint["product_flop"] == 2 * 3 * (4 * 32**2 + 3 * 32 * 64) * 32
    assert result["time_ratio"] == separate["seconds"]["best"] / joint["seconds"]["best"]
    ratios = result["time_ratio_per_round"]
    assert 0 < ratios["least"] <= ratios["p50"] <= ratios["most"]
    assert result["environment"]["threads"] == 1


def test_what_is_claimed() -> None:
    def met(ratio: float, shape: SweepShape = SHAPE) -> Any:
        (claim,) = claims({"shape": vars(shape), "time_ratio": ratio})
        assert claim["figure"] == ratio
        return claim["met"]

    assert met(30.0) is True and met(29.9) is False
    assert met(29.9, TINY) is None


def test_as_a_command(
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = steer_sweep.steer_sweep
    monkeypatch.setattr(steer_sweep, "steer_sweep", lambda rounds, device: real(rounds, CPU, TINY))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert main(["bench", "steer-sweep", "--rounds", "2", "--save", "tiny"]) == 0
    saved = json.loads((tmp_path / "tiny.json").read_text())
    assert saved == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert saved["benchmark"] == "steer_sweep" and saved["rounds"] == 2
    assert main(["bench", "steer-sweep", "--rounds", "1"]) == 2
    assert "--rounds 1 is below 2" in capsys.readouterr().err

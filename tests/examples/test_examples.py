"""The examples run as their heads say, and training is reproducible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shardlens

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *words: str) -> str:
    """What an example prints, started as a user does: without the PYTHONSAFEPATH of launch.sh,
    under which a script does not find the modules beside it.
    """
    command = [sys.executable, str(EXAMPLES / name), *words]
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONSAFEPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_read_a_prediction() -> None:
    lines = run("read_a_prediction.py").splitlines()
    assert len(lines) == 7 and "' Tesk'" in lines[-1] and "KL to the output 0.00" in lines[-1]


@pytest.mark.slow
def test_steer_an_answer() -> None:
    lines = run("steer_an_answer.py").splitlines()
    slopes = [float(line.split("slope ")[1].split()[0]) for line in lines[:3]]
    assert min(slopes) > 1
    bold, plain, cautious = lines[3:]
    assert "without fear" in bold and plain.endswith(" look twice to be safe.")
    assert "test the ground" in cautious


@pytest.mark.slow
def test_training_is_reproducible(tmp_path: Path) -> None:
    """Two steps twice: the same weights to the bit, and a directory that loads."""
    for name in ("one", "two"):
        out, metrics = tmp_path / name, tmp_path / f"{name}.json"
        table = run("train_demo.py", "--steps", "2", "--out", str(out), "--metrics", str(metrics))
        assert "loss after each block" in table
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(json.loads((tmp_path / "one.json").read_text())["held_out_loss_by_layer"]) == 6
    model, tokenizer = shardlens.load(tmp_path / "one")
    assert model.config.vocab_size == tokenizer.n_vocab

"""The examples run as their heads say, and training is reproducible."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL
from tolerances import EFFECT, GRADIENT_RELATIVE
from torch import Tensor

import shardlens
from shardlens.model import ModelConfig, Transformer, init_weights
from shardlens.parallel import TensorParallel

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAME_LOSS = 1e-5  # nats


def run(name: str, *words: str, ranks: int = 0) -> str:
    """The output of an example, started as a user does; with ranks, by torchrun.

    That is without the PYTHONSAFEPATH of launch.sh, under which a script does not find the modules
    beside it.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(torchrun if ranks else []), str(EXAMPLES / name), *words]
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONSAFEPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions of train_demo.py."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return import_module("train_demo")


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
def test_train_a_vector(tmp_path: Path) -> None:
    """It beats the mean difference of its norm, on questions that neither was made from."""
    path = tmp_path / "trained.safetensors"
    *_, trained, mean = run("train_a_vector.py", str(path)).splitlines()
    slope, other = (float(line.split("slope ")[1].split()[0]) for line in (trained, mean))
    assert slope > other + 1 > 3
    norms = [line.split("norm ")[1].split(",")[0] for line in (trained, mean)]
    assert norms[0] == norms[1]
    vectors = shardlens.SteeringVectors.load(path, shardlens.load("demo").model.config)
    assert f"{vectors.norm(vectors.taps[0]):.1f}" == norms[0]
    assert vectors.origin.method == "trained" and vectors.origin.n_pairs == 80


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_train_fsdp2(tensor_parallel: int, tmp_path: Path) -> None:
    """Two ranks with other texts each, or with half of the model each."""
    out = tmp_path / "lens.jsonl"
    words = ("--steps", "41", "--every", "40", "--tensor-parallel", str(tensor_parallel))
    printed = run("train_fsdp2.py", *words, "--out", str(out), ranks=2).splitlines()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 40] and lines[0]["layers"] == [0, 1, 2, 3]
    for line, shown in zip(lines, printed, strict=True):
        losses = shown.split("each block")[1].split()
        assert losses == [f"{loss:.3f}" for loss in line["loss"]]
    first, last = (line["loss"] for line in lines)
    assert all(abs(loss - math.log(512)) < 0.2 for loss in first)
    assert all(before - after > 1 for before, after in zip(first, last, strict=True))


@pytest.mark.slow
def test_training_is_reproducible(tmp_path: Path) -> None:
    """Two steps twice: the same weights to the bit, and a directory that loads."""
    for name in ("first", "second"):
        out, metrics = tmp_path / name, tmp_path / f"{name}.json"
        table = run("train_demo.py", "--steps", "2", "--out", str(out), "--metrics", str(metrics))
        assert "loss after each block" in table
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")
    )
    assert first == second
    assert len(json.loads((tmp_path / "first.json").read_text())["held_out_loss_by_layer"]) == 6
    lm = shardlens.load(tmp_path / "first")
    assert lm.model.config.vocab_size == lm.tokenizer.n_vocab


def test_training_loss_is_the_same_on_ranks(run_ranks: Any, training: ModuleType) -> None:
    """The loss of a step and its gradients, where the head's rows are split, too."""
    config = ModelConfig.from_hf(SMALL | {"architectures": ["LlamaForCausalLM"]})
    assert not config.tied_head
    ids = torch.randint(0, 250, (4, 12))  # in the slice of the first of two ranks
    micro_batches = [(part, torch.rand(part.shape)) for part in ids.chunk(2)]

    def body(parallel: TensorParallel) -> tuple[float, float, Tensor, Tensor]:
        model = Transformer(config, parallel=parallel)
        init_weights(model)
        logits = model.head(model.norm(model(ids[:, :-1])))  # as if these were all
        of_slice = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        loss = training.backward(model, micro_batches)
        assert model.embed.weight.grad is not None and model.head.weight.grad is not None
        rows = slice(model.head.vocab.size)
        return loss, of_slice, model.embed.weight.grad[rows], model.head.weight.grad[rows]

    [(loss, whole, *truth)] = run_ranks(1, body)
    on_two = run_ranks(2, body)
    for on_rank, of_slice, *_ in on_two:
        assert abs(on_rank - loss) <= SAME_LOSS
        assert abs(of_slice - whole) > EFFECT * SAME_LOSS
    for index, gradient in enumerate(truth):
        ours = torch.cat([found[2 + index] for found in on_two])
        assert (ours - gradient).abs().max() <= GRADIENT_RELATIVE * gradient.abs().max()


def test_training_is_measured_alike_on_ranks(run_ranks: Any, training: ModuleType) -> None:
    """Held-out words and letters, by the best next token and by the logits of two."""
    lm = shardlens.load("demo")
    items = training.recall_items(Random("a few"), 20)
    disposition = training.people.DISPOSITIONS[0]

    def body(parallel: TensorParallel) -> tuple[float, dict[str, float]]:
        model = shardlens.load("demo", parallel=parallel).model
        words = training.word_accuracy(model, lm.tokenizer, items)
        return words, training.disposition_accuracy(
            model, lm.tokenizer, disposition, stated=False, items=10
        )

    [(words, letters)] = run_ranks(1, body)
    assert words > 0.5 and letters["accuracy"] > 0.8
    assert run_ranks(2, body) == [(words, letters)] * 2

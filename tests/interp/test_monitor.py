"""Metrics of layers while a model trains, against full logits; the training is left as it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from others import IDS, hooks, is_clean, llama
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from shardlens.interp import LayerMetrics, LensMonitor, watch

TARGETS = IDS.roll(-1, 1).clone()
TARGETS[:, -1] = -100


def truth(model: nn.Module, targets: Tensor = TARGETS) -> dict[str, Any]:
    """The metrics of all valid positions, from full float64 logits of every layer."""
    with torch.no_grad(), watch(model) as watching:
        model(IDS)
    states = watching.stacked().double()  # [B, T, L, d]
    head = model.lm_head.weight.double()
    normed = states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    logprobs = (normed * model.model.norm.weight.double() @ head.T).log_softmax(-1)
    valid = targets >= 0
    rows, ids = logprobs[valid], targets[valid]  # [N, L, V]
    best, final = rows.argmax(-1), rows[:, -1:]
    leads = best == best[:, -1:]
    first = leads & (leads.cumsum(1) == 1)
    norms = states.norm(dim=-1)
    return {
        "loss": -rows.gather(-1, ids[:, None, None].expand(-1, 3, 1))[..., 0].mean(0),
        "entropy": -(rows * rows.exp()).sum(-1).mean(0),
        "kl_to_final": (final.exp() * (final - rows)).sum(-1).mean(0),
        "leads": leads.double().mean(0),
        "first_leads": first.double().mean(0),
        "agrees_with_next": (best[:, :-1] == best[:, 1:]).double().mean(0),
        "norm": norms.mean((0, 1)),
        "sink": (norms.amax(1) / norms.median(1).values).mean(0),
        "depth": (first.double().mean(0) * torch.arange(3)).sum(),
    }


def check(found: LayerMetrics, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        measured = torch.tensor(getattr(found, name), dtype=torch.float64)
        if name == "agrees_with_next":
            assert math.isnan(measured[-1])
            measured = measured[:-1]
        torch.testing.assert_close(measured, value, atol=1e-5, rtol=1e-5, msg=name)


def test_metrics_equal_those_of_full_logits() -> None:
    model, found = llama(), []
    monitor = LensMonitor(model, every=1, to=found.append)
    with monitor.at(0, TARGETS):
        model(IDS)
    assert found[0].layers == [0, 1, 2] and found[0].step == 0
    check(found[0], truth(model))
    assert is_clean(model)


def train(monitor: bool, *, compile_blocks: bool = False, checkpoint: bool = False) -> nn.Module:
    model = llama().train()
    if checkpoint:
        model.gradient_checkpointing_enable()
    if compile_blocks:
        for block in model.model.layers:
            block.compile(backend="aot_eager")
    found: list[LayerMetrics] = []
    looking = LensMonitor(model, every=3, layers=[0], positions=5, to=found.append)
    rule = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1)
    for step in range(20):
        for _ in range(2):  # gradient accumulation
            ids = torch.randint(0, 97, (2, 7))
            if monitor:
                with looking.at(step, ids):
                    loss = model(ids, labels=ids, use_cache=False).loss
            else:
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
        rule.step()
        rule.zero_grad()
    assert not monitor or [each.step for each in found] == [
        n for n in range(0, 20, 3) for _ in "ab"
    ]
    return model


COMPILED = pytest.param({"compile_blocks": True}, marks=pytest.mark.slow)


@pytest.mark.parametrize("how", [{}, {"checkpoint": True}, COMPILED])
def test_training_is_left_as_it_is(how: dict[str, bool]) -> None:
    torch._dynamo.reset()
    plain, watched = train(False, **how), train(True, **how)
    for left, right in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(left, right)
    assert hooks(watched) == hooks(plain)  # checkpointing has one


def test_steps_that_are_not_looked_at_share_one_empty_context() -> None:
    monitor = LensMonitor(llama(), every=100, to=lambda metrics: None)
    assert monitor.at(1) is monitor.at(99, TARGETS)


@pytest.mark.slow
def test_a_model_that_is_compiled_whole() -> None:
    torch._dynamo.reset()
    model, counter, found = llama(), CompileCounter(), []
    compiled = torch.compile(model, backend=counter)
    monitor = LensMonitor(compiled, every=2, to=found.append)
    with torch.no_grad():
        for step in range(8):
            with monitor.at(step, TARGETS):
                compiled(IDS)
    assert counter.frame_count == 2  # with the lens and without
    check(found[-1], truth(llama()))
    torch._dynamo.reset()


def test_a_sample_of_positions_and_no_targets() -> None:
    model, found = llama(), []
    monitor = LensMonitor(model, every=1, positions=4, layers=[1], to=found.append)
    for _ in range(2):
        with monitor.at(7, TARGETS):
            model(IDS)
    with monitor.at(8):
        model(IDS)
    with monitor.at(9, torch.full_like(TARGETS, -100)):
        model(IDS)
    first, again, unlabelled, empty = found
    assert first.to_dict() == again.to_dict() and first.layers == [1, 2]
    assert math.isnan(unlabelled.loss[0]) and unlabelled.entropy[0] > 0
    assert math.isnan(empty.loss[0]) and math.isnan(empty.entropy[0]) and empty.norm[0] > 0
    everything = truth(model)
    assert abs(first.loss[0] - everything["loss"][1].item()) > 1e-4  # a sample, not all


def test_files_and_boards(tmp_path: Path) -> None:
    class Board:
        def __init__(self) -> None:
            self.scalars: dict[str, tuple[float, int]] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars[name] = (value, step)

    model, board, path = llama(), Board(), tmp_path / "lens.jsonl"
    for to in (path, board):
        monitor = LensMonitor(model, every=5, to=to)
        for step in range(10):
            with monitor.at(step, TARGETS):
                model(IDS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5]
    assert lines[1]["agrees_with_next"][-1] is None
    assert board.scalars["lens/loss/layer 1"] == (lines[1]["loss"][1], 5)
    assert board.scalars["lens/depth"][0] == lines[1]["depth"]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"every": 0}, "every 1 step or more"),
        ({"every": 1.5}, "every"),
        ({"layers": 3}, "layer 3 does not exist"),
        ({"to": "lens.csv"}, "written to .jsonl"),
        ({"to": "/nosuchfolder/lens.jsonl"}, "there is no folder"),
        ({"to": 3}, "a function, a path"),
    ],
)
def test_what_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LensMonitor(llama(), **{"to": print, **options})


def test_targets_of_another_shape_are_refused() -> None:
    model = llama()
    monitor = LensMonitor(model, every=1, to=print)
    with pytest.raises(ValueError, match="for a pass of"), monitor.at(0, TARGETS[:, :-1]):
        model(IDS)
    with pytest.raises(ValueError, match="no pass has ended"), monitor.at(0, TARGETS):
        pass
    assert is_clean(model)

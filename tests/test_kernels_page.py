"""docs/kernels.md: its programs run, on one rank and on several, and give what torch gives."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_docs import blocks
from tolerances import GRADIENT_RELATIVE, LENS

import shardlens.kernels
import shardlens.parallel
from shardlens.parallel import TensorParallel

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
TEXT = PAGE.read_text(encoding="utf-8")


def run(numbers: range) -> dict[str, Any]:
    """The names that some of the page's programs leave, run one after another."""
    names: dict[str, Any] = {}
    programs = list(blocks(TEXT, "python"))
    assert len(programs) == 4
    for number in numbers:
        exec(compile(programs[number], str(PAGE), "exec"), names)
    return names


def check_loss(names: dict[str, Any]) -> None:
    """Loss, gradients, log-probs and ranks against full logits."""
    everything, targets, ids = names["everything"], names["targets"], names["ids"]
    hidden = names["hidden"].detach().requires_grad_()
    whole = everything.clone().requires_grad_()
    logits = hidden @ whole.T
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    assert float((names["loss"] - loss).detach().abs()) < LENS
    assert float((names["evaluation_loss"] - loss).detach().abs()) < LENS
    assert hidden.grad is not None and whole.grad is not None
    mine = whole.grad[ids.start : ids.stop]
    for ours, theirs in ((names["hidden"].grad, hidden.grad), (names["weight"].grad, mine)):
        assert (ours - theirs).abs().max() <= GRADIENT_RELATIVE * theirs.abs().max()
    at_target = logits.gather(1, targets.clamp(0)[:, None])
    ranks = (logits > at_target).sum(-1).where(targets >= 0, -1)
    assert torch.equal(names["ranks"], ranks)
    assert torch.equal(names["read"].token_ids, logits.topk(5).indices)


def test_programs_run_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that traces and differentiates the graph, and generates no code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    names = run(range(4))
    block, x = names["block"], torch.randn(3, 64)
    y = F.rms_norm(2 * x, (64,), block.norm, 1e-5)
    gate, up = block.gate_up(y).chunk(2, -1)
    out, h = names["compiled"](x, x)
    torch.testing.assert_close(out, block.down(F.silu(gate) * up))
    torch.testing.assert_close(h, 2 * x)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())
    check_loss(names)
    counted, read = names["counted"], names["read"]
    loss = names["loss_by_row"][counted]
    torch.testing.assert_close(loss, -read.target_logprob[counted])
    assert torch.equal(names["stats"].target_rank[counted], read.target_rank[counted])


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_loss_runs_on_several_ranks(
    ranks: int, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorParallel, "from_env", TensorParallel.from_group)
    found = run_ranks(ranks, lambda parallel: run(range(1, 3)))
    assert len({names["ids"].start for names in found}) == ranks
    for names in found:
        check_loss(names)


def test_signatures_are_those_of_the_code() -> None:
    """Every signature in bold names the arguments of its function, in order."""
    flat = " ".join(TEXT.split())
    found = re.findall(r"\*\*`(\w+)\(([^`]*?)\) -> [^`]+`", flat)
    assert [name for name, _ in found] == [
        "rmsnorm_steer",
        "swiglu",
        "vocab_parallel_cross_entropy",
        "head_stats",
    ]
    for name, arguments in found:
        home = shardlens.kernels if hasattr(shardlens.kernels, name) else shardlens.parallel
        parameters = inspect.signature(getattr(home, name)).parameters.values()
        written = [word.split("=")[0] for word in arguments.split(", ") if word != "*"]
        assert written == [parameter.name for parameter in parameters], name
        defaults = [word.split("=")[1] for word in arguments.split(", ") if "=" in word]
        expected = [p.default for p in parameters if p.default is not inspect.Parameter.empty]
        assert [eval(default) for default in defaults] == expected, name

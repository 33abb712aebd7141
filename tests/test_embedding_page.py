"""docs/embedding.md: its programs run, and give what full logits and plain autograd give."""

from __future__ import annotations

import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from others import is_clean
from test_docs import blocks
from tolerances import LENS

import shardlens.interp
from shardlens.interp import LayerMetrics, Unembedding
from shardlens.model import Tap

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "embedding.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_programs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another; the compiler traces, and generates no code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    programs = list(blocks(TEXT, "python"))
    assert len(programs) == 6
    names: dict[str, Any] = {}
    checks = (None, check_watch, check_compiled, check_read, check_steered, check_monitor)
    for program, check in zip(programs, checks, strict=True):
        exec(compile(program, str(PAGE), "exec"), names)
        if check is not None:
            check(names)
        assert is_clean(names["model"])
    torch._dynamo.reset()


def check_watch(names: dict[str, Any]) -> None:
    points = ("resid_mid", "resid_post")
    assert list(names["watching"].taps) == [Tap(n, point) for n in range(4) for point in points]
    model, states = names["model"], names["states"]
    assert states.shape == (2, 16, 8, 64)
    logits = model.lm_head(model.model.norm(states[:, :, -1]))
    torch.testing.assert_close(logits, names["logits"])


def check_compiled(names: dict[str, Any]) -> None:
    block, states = names["model"].model.layers[1], names["states"]
    mlp_out = block.mlp(block.post_attention_layernorm(states[:, :, 2]))  # resid_mid of layer 1
    torch.testing.assert_close(names["mlp_out"][:, :, 0], mlp_out)


def check_read(names: dict[str, Any]) -> None:
    model, read = names["model"], names["read"]
    logprobs = model.lm_head(model.model.norm(names["states"])).double().log_softmax(-1)
    best = logprobs.topk(5, -1)
    assert torch.equal(read.token_ids, best.indices)
    assert (read.logprobs - best.values).abs().max() < LENS
    assert (read.entropy + (logprobs * logprobs.exp()).sum(-1)).abs().max() < LENS
    at_target = logprobs[:, :-1].gather(-1, names["per_tap"][:, :-1, :, None])
    assert (read.target_logprob[:, :-1] - at_target[..., 0]).abs().max() < LENS
    # of ids that are closer than rounding, either may be first; the target itself beats nothing
    least, most = ((logprobs[:, :-1] > at_target + off).sum(-1) for off in (LENS, -LENS))
    ranks, is_clear = read.target_rank[:, :-1], most - 1 == least
    assert (least <= ranks).all() and (ranks < most).all()
    assert is_clear.double().mean() > 0.9
    assert (read.target_rank[:, -1] == -1).all()
    final = logprobs[:, :, -1:]
    kl = (final.exp() * (final - logprobs)).sum(-1)
    assert (read.kl_to_final - kl).abs().max() < LENS and kl.max() > 100 * LENS
    assert torch.equal(names["row"], model.lm_head.weight[7])


def check_steered(names: dict[str, Any]) -> None:
    model, ids, vector = names["model"], names["ids"], names["vector"]
    assert names["text"].shape == (2, 20)
    unsteered = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not torch.equal(names["text"], unsteered)
    change = torch.zeros(64, requires_grad=True)  # the same edit, as a change of an output

    def add(module: Any, given: Any, output: Any) -> Any:
        return output + vector.detach() + change

    handle = model.model.layers[1].register_forward_hook(add)
    model(ids, labels=ids).loss.backward()
    handle.remove()
    assert change.grad is not None and change.grad.abs().max() > 1e-4
    torch.testing.assert_close(vector.grad, change.grad)
    torch.testing.assert_close(names["scale"].grad, change.grad @ vector.detach())
    model.zero_grad()


def check_monitor(names: dict[str, Any]) -> None:
    first, last = (json.loads(line) for line in Path("lens.jsonl").read_text().splitlines())
    assert (first["step"], last["step"]) == (0, 100)
    assert len(first["loss"]) == 4 and abs(first["loss"][-1] - 6.2) < 0.5
    fields = re.search(r"A line\nhas, per layer, (.*?), and the `depth`", TEXT, re.DOTALL)
    assert fields is not None
    named = [*re.findall(r"`(\w+)`", fields[1]), "depth"]
    assert named == [
        name for name in LayerMetrics.__annotations__ if name not in ("step", "layers")
    ]


def test_signatures_are_those_of_the_code() -> None:
    """Every signature in bold names the arguments of its function, in order, with defaults."""
    found = re.findall(r"\*\*`([\w.]+)\(([^`]*?)\)(?: -> \w+)?`\*\*", " ".join(TEXT.split()))
    homes = {"Unembedding.of": Unembedding.of}
    assert [name for name, _ in found] == ["watch", "Unembedding.of", "steered", "LensMonitor"]
    for name, arguments in found:
        function = homes.get(name) or getattr(shardlens.interp, name)
        parameters = inspect.signature(function).parameters.values()
        written = [word.split("=") for word in arguments.split(", ") if word != "*"]
        assert [name for name, *_ in written] == [each.name for each in parameters], name
        for (_, *default), each in zip(written, parameters, strict=True):
            expected = [] if each.default is inspect.Parameter.empty else [each.default]
            assert [eval(value) for value in default] == expected, (name, each.name)

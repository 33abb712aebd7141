"""Captured decode steps on a GPU: the same as eager ones, and captured once for each shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracles import SMALL
from tolerances import PASSES

import shardlens
from shardlens.kernels.language import HAS_TRITON
from shardlens.model import ModelConfig, Transformer, init_weights
from shardlens.model.engine import Engine, EngineStep
from shardlens.model.sampling import Sampling
from shardlens.model.steering import Steering

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and HAS_TRITON), reason="needs a GPU"),
]
PROMPTS = [[5, 9, 17, 4], [8] * 21, [44]]
SAMPLINGS = [Sampling(), Sampling(1.0, seed=3), Sampling(0.7, top_k=9, seed=1)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig.from_hf({**SMALL, "architectures": ["Qwen3ForCausalLM"], "head_dim": 16})
    made = Transformer(config)
    init_weights(made, std=0.3)
    return made.to("cuda").eval().requires_grad_(False)


def run(model: Transformer, **options: Any) -> list[shardlens.Result]:
    options = {"max_new_tokens": 12, "sampling": SAMPLINGS, "stop_ids": (), **options}
    results = shardlens.generate(model, PROMPTS, **options)
    assert isinstance(results, list)
    return results


def assert_same(ours: list[shardlens.Result], others: list[shardlens.Result]) -> None:
    for one, other in zip(ours, others, strict=True):
        assert one.token_ids == other.token_ids
        assert one.trace is not None and other.trace is not None
        for name in ("positions", "targets", "token_ids", "target_rank"):
            assert torch.equal(getattr(one.trace, name), getattr(other.trace, name)), name
        for name in ("logprobs", "entropy", "kl_to_final", "target_logprob"):
            gap = getattr(one.trace, name) - getattr(other.trace, name)
            assert gap.abs().max() <= PASSES, name


@pytest.mark.parametrize("targets", ["next", None, 7])
@pytest.mark.parametrize("mode", ["live", "deferred"])
def test_captured_equals_eager(model: Transformer, mode: str, targets: Any) -> None:
    spec = shardlens.LensSpec(points=("mlp_out", "resid_post"), mode=mode, targets=targets)
    steering = [Steering(torch.ones(48), [1], "mlp_norm", scale=0.5, positions="generated")]
    meeting = [*steering, Steering(torch.ones(48), "all", "mlp_norm", "clamp", 2.0, 6)]
    for edits in ((), steering, meeting):
        captured = run(model, lens=spec, steering=edits)
        assert isinstance(model.engine, Engine)
        steps = list(model.engine.steps.values())
        assert any(step.graph is not None for step in steps)
        assert_same(captured, run(model, lens=spec, steering=edits, capture=False))
    assert captured[0].token_ids != run(model)[0].token_ids or captured[1] != run(model)[1]


def test_changes_that_capture_nothing_anew(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = []
    original = EngineStep._capture

    def counted(self: EngineStep) -> None:
        captures.append(self.step.shape)
        original(self)

    monkeypatch.setattr(EngineStep, "_capture", counted)
    model.engine = None
    spec = shardlens.LensSpec(targets=3)
    vector = torch.randn(48)
    base = run(model, lens=spec, steering=[Steering(vector, [1], scale=0.0)])
    for change in (
        dict(steering=[Steering(vector, [0, 2], scale=2.0, positions=[5, 6])]),
        dict(steering=[[], [Steering(-vector, "all", mode="ablate")], []]),
        dict(lens=dataclasses.replace(spec, targets=9)),
        dict(sampling=[dataclasses.replace(s, seed=s.seed + 1) for s in SAMPLINGS]),
        dict(stop_ids=(base[0].token_ids[3],)),
    ):
        options = {"lens": spec, "steering": [Steering(vector, [1], scale=0.0)], **change}
        assert_same(run(model, **options), run(model, capture=False, **options))
    model.engine = None
    captures.clear()
    for top_k in (4, 5, 4, 5):
        run(model, lens=dataclasses.replace(spec, top_k=top_k))
    assert len(captures) == 2


def test_memory_stays_flat_while_it_streams(model: Transformer) -> None:
    peaks = []
    for n_tokens in (40, 100):
        model.engine = None
        torch.cuda.reset_peak_memory_stats()
        run(model, max_new_tokens=n_tokens, lens=shardlens.LensSpec(), on_lens=lambda *piece: None)
        assert isinstance(model.engine, Engine)
        cache = model.engine.cache
        peaks.append(torch.cuda.max_memory_allocated() - 2 * cache.keys.nbytes)
    assert abs(peaks[1] - peaks[0]) <= 64 * 1024

"""Captured decode steps on a GPU: the same as eager ones, and captured once for each shape."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from functools import lru_cache
from typing import Any

import pytest
import torch
from running import requests_of
from tolerances import PASSES

import shardlens
from shardlens.engine import Sampling, Steering
from shardlens.engine.engine import StepCache
from shardlens.engine.memory import CUBLAS_WORKSPACE_BYTES
from shardlens.engine.runner import StepRunner
from shardlens.engine.step import DecodeStep
from shardlens.kernels.triton_shim import HAS_TRITON
from shardlens.model import ModelConfig, Transformer, init_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and HAS_TRITON), reason="needs a GPU"),
]
PROMPTS = [[5, 9, 17, 4], [8] * 21, [44]]
SAMPLED = [Sampling(), Sampling(1.0, seed=3), Sampling(0.7, top_k=9, seed=1)]
D = 64
CONFIG: dict[str, Any] = dict(
    architectures=["Qwen3ForCausalLM"],
    vocab_size=509,
    hidden_size=D,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,  # so that attention of a cache of 256 is split
)


@lru_cache
def model_of(dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(ModelConfig.from_hf(CONFIG))
    init_weights(made, std=0.3)
    return made.to("cuda", dtype).eval().requires_grad_(False)


@pytest.fixture
def model() -> Transformer:
    return model_of(torch.float32)


def run(model: Transformer, **options: Any) -> list[shardlens.Result]:
    settings = {"max_new_tokens": 12, "sampling": SAMPLED, "stop_ids": (), **options}
    call = {name: settings.pop(name) for name in ("capture", "on_lens") if name in settings}
    return _language_model(model).generate(requests_of(PROMPTS, **settings), **call)


@lru_cache
def _language_model(model: Transformer) -> shardlens.LanguageModel:
    """One per model, which keeps its graphs between runs."""
    return shardlens.LanguageModel(model)


def assert_same(ours: list[shardlens.Result], others: list[shardlens.Result]) -> None:
    for our, other in zip(ours, others, strict=True):
        assert our.token_ids == other.token_ids
        assert (our.trace is None) == (other.trace is None)
        if our.trace is None or other.trace is None:
            continue
        for name in ("positions", "targets", "token_ids", "target_rank"):
            assert torch.equal(getattr(our.trace, name), getattr(other.trace, name)), name
        for name in ("logprobs", "entropy", "kl_to_final", "target_logprob"):
            pair = getattr(our.trace, name), getattr(other.trace, name)
            assert torch.allclose(*pair, rtol=0, atol=PASSES, equal_nan=True), name


def kept(model: Transformer) -> StepCache:
    """The memory and the steps that the last run left."""
    steps = _language_model(model)._engine.kept
    assert steps is not None
    return steps


def assert_captured(model: Transformer) -> None:
    assert all(step.graph is not None for step in kept(model).steps.values())


# All that changes a step's shape.
POINTS = ("mlp_out", "resid_post")
LENSES = {
    "no lens": None,
    "live, no target": shardlens.LensSpec(points=POINTS, targets=None),
    "live, fixed": shardlens.LensSpec(points=POINTS, targets=7),
    "live, next": shardlens.LensSpec(points=POINTS),
    "deferred": shardlens.LensSpec(points=POINTS, mode="deferred"),
}
SAMPLINGS = {
    "greedy": [Sampling()] * 3,
    "plain": [Sampling(), Sampling(1.0, seed=3), Sampling(1.0, seed=4)],
    "scaled, top-k": SAMPLED,
    # the second nucleus is wider than the candidates at hand, so that the host must find its token
    "top-p": [Sampling(0.8, top_p=0.9, seed=5), Sampling(40.0, top_p=0.6, seed=2), Sampling()],
}
EDIT = Steering(torch.ones(D), [1], "mlp_norm", scale=0.5, positions="generated")
STEERINGS = {
    "unsteered": [],
    "one edit": [EDIT],
    "meeting edits": [EDIT, Steering(torch.ones(D), "all", "mlp_norm", "clamp", 2.0, 6)],
}
COMBINATIONS = list(itertools.product(LENSES, SAMPLINGS, STEERINGS))
# 16 bits have all; of float32, whose kernels take as long to compile, each lens has one sampling
FEW = [
    (lens, sampling, steering)
    for lens, sampling, steering in COMBINATIONS
    if (list(LENSES).index(lens) + list(SAMPLINGS).index(sampling)) % len(SAMPLINGS) == 0
]
CASES = [
    *((dtype, *names) for dtype in (torch.bfloat16, torch.float16) for names in COMBINATIONS),
    *((torch.float32, *names) for names in FEW),
]


@pytest.mark.parametrize("dtype, lens, sampling, steering", CASES, ids=str)
def test_captured_equals_eager(
    dtype: torch.dtype, lens: str, sampling: str, steering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the token, in 16 bits, too: both run the same kernels on the same shapes."""
    # one configuration of each kernel: which one is of no matter here, and compiling takes longest
    head = importlib.import_module("shardlens.kernels.head_stats")
    monkeypatch.setattr(head, "choose", lambda key, device, configs, run: configs[0])
    model = model_of(dtype)
    options: dict[str, Any] = {
        "lens": LENSES[lens], "sampling": SAMPLINGS[sampling], "steering": STEERINGS[steering]
    }  # fmt: skip
    _language_model.cache_clear()
    captured = run(model, **options)
    assert_captured(model)
    assert_same(captured, run(model, **options, capture=False))
    if steering != "unsteered":
        plain = run(model, **{**options, "steering": []}, capture=False)
        assert [result.token_ids for result in plain] != [result.token_ids for result in captured]


def test_changes_that_capture_nothing_anew(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = []
    original = StepRunner._capture

    def counted(self: StepRunner) -> None:
        captures.append(self.step.shape)
        original(self)

    monkeypatch.setattr(StepRunner, "_capture", counted)
    _language_model.cache_clear()
    spec = shardlens.LensSpec(targets=3)
    vector = torch.randn(D)
    base: dict[str, Any] = {"lens": spec, "steering": [Steering(vector, [1], scale=0.0)]}
    stop = run(model, **base)[0].token_ids[3]
    changed = [
        base | change
        for change in (
            dict(steering=[Steering(vector, [0, 2], scale=2.0, positions=[5, 6])]),
            dict(steering=[[], [Steering(-vector, "all", mode="ablate")], []]),
            dict(lens=dataclasses.replace(spec, targets=9)),
            dict(sampling=[dataclasses.replace(s, seed=s.seed + 1) for s in SAMPLED]),
            dict(stop_ids=(stop,)),
        )
    ]
    results = [run(model, **options) for options in changed]
    assert len(captures) == 1
    for options, result in zip(changed, results, strict=True):
        assert_same(result, run(model, **options, capture=False))
    _language_model.cache_clear()
    captures.clear()
    for top_k in (4, 5, 4, 5):
        run(model, lens=dataclasses.replace(spec, top_k=top_k))
    assert len(captures) == 2


@pytest.mark.filterwarnings("always")
def test_a_failed_capture_leaves_an_eager_run_and_a_sound_process(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = DecodeStep.read

    def waiting(self: DecodeStep) -> None:
        read(self)
        torch.cuda.current_stream().synchronize()  # which may not be captured

    before = torch.cuda.current_stream()
    _language_model.cache_clear()
    monkeypatch.setattr(DecodeStep, "read", waiting)
    with pytest.warns(UserWarning, match="cannot be captured.*when stream is capturing") as caught:
        failed = [run(model) for _ in range(2)]
    assert len(caught) == 1 and torch.cuda.current_stream() == before
    monkeypatch.undo()
    torch.cuda.empty_cache()  # raises where PyTorch thinks that it is still capturing,
    torch.rand(3, device="cuda")  # and so does this
    eager = run(model, capture=False)
    for results in failed:
        assert_same(results, eager)
    assert_same(run(model), eager)
    assert_captured(model)


def test_a_capture_leaves_nothing_behind(model: Transformer) -> None:
    """Neither a workspace of its stream nor its pool outlive the engine that had them."""
    allocated, reserved = [], []
    run(model, capture=False)
    for _ in range(4):
        _language_model.cache_clear()
        run(model)
        assert_captured(model)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allocated.append(torch.cuda.memory_allocated())
        reserved.append(torch.cuda.memory_reserved())
    assert allocated == allocated[:1] * 4
    # what a segment of memory is cut into may differ; a workspace has one to itself
    assert max(reserved) - min(reserved) < CUBLAS_WORKSPACE_BYTES // 4


def test_memory_stays_flat_while_it_streams(model: Transformer) -> None:
    peaks = []
    for n_tokens in (40, 40, 100):  # the first run times configurations, which takes memory
        _language_model.cache_clear()
        torch.cuda.reset_peak_memory_stats()
        run(model, max_new_tokens=n_tokens, lens=shardlens.LensSpec(), on_lens=lambda *piece: None)
        cache = kept(model).cache
        peaks.append(torch.cuda.max_memory_allocated() - 2 * cache.keys.nbytes)
    assert abs(peaks[2] - peaks[1]) <= 64 * 1024

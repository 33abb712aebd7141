"""How steps are captured, and what a capture that fails leaves: on a CPU, under a pretended CUDA.

What is pretended behaves as PyTorch's own, also where that is of no help: a capture that cannot be
ended leaves its stream current and its memory pool open.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracles import SMALL
from running import requests_of

import shardlens
from shardlens.engine import Engine, Sampling, Steering
from shardlens.engine import cuda_graph as graphs
from shardlens.engine import runner as runner_module
from shardlens.engine.engine import StepCache
from shardlens.engine.runner import StepRunner
from shardlens.engine.step import DecodeStep, StepShape
from shardlens.model import ModelConfig, Transformer, init_weights

DEVICE = torch.device("cpu")
WHY = "CUDA error: operation not permitted when stream is capturing"
PROMPTS = [[5, 9, 17, 4], [8] * 21, [44]]
SAMPLINGS = [Sampling(), Sampling(1.0, seed=3), Sampling(0.7, top_k=9, seed=1)]
EDITS = [Steering(torch.ones(48), [1], "mlp_norm", scale=0.5, positions="generated")]


class Stream:
    def __init__(self, cuda: PretendedCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.cuda.log.append(f"wait for {self.name}")


class PretendedCuda:
    """Logs what is called, and is `capturing` inside a capture."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams: list[Stream] = []
        self.current = self.main = Stream(self, "main")
        self.capturing = self.is_broken = False
        self.open_pools: set[int] = set()
        self.generator = PretendedGenerator()
        self.n_pools = 0

    def new_stream(self, device: torch.device) -> Stream:
        assert device == DEVICE
        self.streams.append(Stream(self, f"side {len(self.streams)}"))
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def new_pool(self) -> int:
        self.n_pools += 1
        return self.n_pools

    @contextmanager
    def graph(
        self, graph: Any, *, pool: int, stream: Stream, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        before, self.current, self.capturing = self.current, stream, True
        self.open_pools.add(pool)
        self.log.append(f"begin {capture_error_mode} on {stream.name}")
        try:
            yield
        finally:
            self.capturing = False
            if self.is_broken:
                raise RuntimeError("CUDA error: failed due to a previous error during capture")
            self.log.append("end")
            self.open_pools.remove(pool)
            self.current = before

    def end_pool(self, index: int | None, pool: int) -> None:
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.remove(pool)
        self.generator.is_stuck = True

    def clear(self) -> None:
        self.log.append("clear")

    def fail(self) -> None:
        """Raise as an operation does that may not be captured."""
        if self.capturing:
            self.is_broken = True
            raise RuntimeError(f"{WHY}\nCompile with `TORCH_USE_CUDA_DSA`")


class PretendedGraph:
    def __init__(self, cuda: PretendedCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.log.append("replay")


class PretendedGenerator:
    is_stuck = False

    def clone_state(self) -> PretendedGenerator:
        return PretendedGenerator()

    def graphsafe_set_state(self, state: PretendedGenerator) -> None:
        self.is_stuck = state.is_stuck


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    made = PretendedCuda()
    run = DecodeStep.run

    def logged(self: DecodeStep) -> None:
        made.log.append(f"run on {made.current.name}")
        self.model.parallel.traffic.add("all_reduce", 10)
        run(self)

    def released(index: int | None, pool: int) -> None:
        made.log.append(f"release {pool}")

    for name, value in {
        "Stream": made.new_stream,
        "stream": made.stream,
        "current_stream": lambda device: made.current,
        "CUDAGraph": lambda: PretendedGraph(made),
        "graph_pool_handle": made.new_pool,
        "graph": made.graph,
        "default_generators": {None: made.generator},
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, call in {
        "_cuda_clearCublasWorkspaces": made.clear,
        "_cuda_endAllocateToPool": made.end_pool,
        "_cuda_releasePool": released,
    }.items():
        monkeypatch.setattr(torch._C, name, call, raising=False)
    monkeypatch.setattr(DecodeStep, "run", logged)
    monkeypatch.setattr(runner_module, "is_capturable", lambda step: True)
    graphs._side_stream.cache_clear()
    yield made
    graphs._side_stream.cache_clear()


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(ModelConfig.from_hf({**SMALL, "architectures": ["LlamaForCausalLM"]}))
    init_weights(made, std=0.3)
    return made.eval().requires_grad_(False)


def new_step(model: Transformer, n_stops: int = 1, capture: bool = True) -> StepRunner:
    shape = StepShape.of(None, [Sampling()], None, n_stops, 509)
    return StepCache(model, 1, 32, capture=capture).step(shape)


@torch.inference_mode()
def test_a_capture_keeps_no_workspace_and_one_stream(
    model: Transformer, cuda: PretendedCuda
) -> None:
    """Nothing that the warm-up's products took is in the graph, nor the graph's in the next one."""
    first, second = new_step(model), new_step(model, n_stops=99)
    first.prepare()
    whole = [
        "side 0 waits for main",
        "clear",
        "run on side 0",
        "run on side 0",
        "wait for side 0",
        "clear",
        "begin thread_local on side 0",
        "run on side 0",
        "end",
        "clear",
        "main waits for side 0",
    ]
    assert cuda.log == whole and first.graph is not None
    cuda.log.clear()
    first.prepare()
    assert cuda.log == []
    second.prepare()
    assert cuda.log == whole and len(cuda.streams) == 1 and cuda.n_pools == 2
    assert cuda.current is cuda.main and not cuda.open_pools and not cuda.generator.is_stuck


@torch.inference_mode()
def test_a_capture_sends_nothing_and_a_replay_what_it_recorded(
    model: Transformer, cuda: PretendedCuda
) -> None:
    step, traffic = new_step(model), model.parallel.traffic
    traffic.reset()
    step.prepare()
    assert traffic.calls == {"all_reduce": 2} and traffic.total_bytes == 20  # the warm-up's
    step.run()
    assert cuda.log[-1] == "replay"
    assert traffic.calls == {"all_reduce": 3} and traffic.total_bytes == 30


@torch.inference_mode()
def test_no_capture_where_it_is_off(model: Transformer, cuda: PretendedCuda) -> None:
    step = new_step(model, capture=False)
    step.prepare()
    assert cuda.log == [] and step.graph is None


def run(model: Transformer, **options: Any) -> list[shardlens.Result]:
    spec = shardlens.LensSpec(points=("mlp_out", "resid_post"))
    settings = {"lens": spec, "steering": EDITS, "stop_ids": (), "max_new_tokens": 8, **options}
    capture = settings.pop("capture", True)
    requests = requests_of(PROMPTS, sampling=SAMPLINGS, **settings)
    return shardlens.LanguageModel(model).generate(requests, capture=capture)


@pytest.mark.parametrize("part", ["stash_taps", "feed", "read"])
@pytest.mark.parametrize("mode", ["live", "deferred"])
def test_a_failed_capture_leaves_an_eager_run_and_one_warning(
    model: Transformer,
    cuda: PretendedCuda,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    part: str,
) -> None:
    """Wherever in the step it fails: half of its buffers hold what the warm-up wrote."""
    spec = shardlens.LensSpec(points=("mlp_out", "resid_post"), mode=mode)
    eager = run(model, capture=False, lens=spec)
    original, kept = getattr(DecodeStep, part), StepCache(model, 3, 29, capture=True)

    def failing(self: DecodeStep) -> None:
        original(self)
        cuda.fail()

    monkeypatch.setattr(DecodeStep, part, failing)
    monkeypatch.setattr(Engine, "_steps", lambda *rest: kept)  # for the next batch, too, as on CUDA
    cuda.log.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [run(model, lens=spec) for _ in range(2)]
    (warning,) = caught
    message = str(warning.message)
    assert f"({WHY})" in message and "\n" not in message and "previous error" not in message
    assert "capture=False" in message and "--eager" in message
    assert sum(line.startswith("begin") for line in cuda.log) == 1, "it is not tried again"
    (step,) = kept.steps.values()
    assert step.graph is None and cuda.current is cuda.main
    # what PyTorch left open is closed: else no memory could be freed, no number drawn
    assert not cuda.open_pools and "release 1" in cuda.log and not cuda.generator.is_stuck
    assert cuda.log.index("release 1") < len(cuda.log) - 1 - cuda.log[::-1].index("clear")
    for tries in results:
        for tried, other in zip(tries, eager, strict=True):
            assert tried.token_ids == other.token_ids
            assert tried.trace is not None and other.trace is not None
            for name in ("positions", "targets", "token_ids", "logprobs", "entropy", "target_rank"):
                assert torch.equal(getattr(tried.trace, name), getattr(other.trace, name)), name


@torch.inference_mode()
@pytest.mark.filterwarnings("error")
def test_an_error_of_the_step_itself_is_raised(
    model: Transformer, cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: DecodeStep) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DecodeStep, "read", broken)
    step = new_step(model)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        step.prepare()
    assert step.graph is None and cuda.current is cuda.main
    assert cuda.log[-2:] == ["clear", "main waits for side 0"] and cuda.n_pools == 0


@torch.inference_mode()
def test_a_capture_that_ended_is_not_closed_twice(
    model: Transformer, cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operation that fails is not CUDA's, so that the capture ends as it should."""

    def failing(self: DecodeStep) -> None:
        if cuda.capturing:
            raise RuntimeError("no room")

    monkeypatch.setattr(DecodeStep, "read", failing)
    step = new_step(model)
    with pytest.warns(UserWarning, match=r"\(no room\)"):
        step.prepare()
    assert step.graph is None and not any("release" in line for line in cuda.log)

"""The end-to-end benchmark on a small model: its checks can fail, its figures add up."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from oracles import SMALL
from torch import Tensor

from shardlens.bench import end_to_end, end_to_end_runs, scaling
from shardlens.bench.baselines import RunOutput
from shardlens.bench.end_to_end import print_result, verdicts
from shardlens.bench.end_to_end_runs import (
    LENS,
    PAPER,
    PLAIN,
    STEERED,
    Setup,
    _uncached,
    disagreement,
    measure_times,
    peak_bytes,
    problems,
)
from shardlens.bench.models import N_LAYERS, model_config, random_model
from shardlens.engine import plan
from shardlens.model import ModelConfig, Transformer
from shardlens.parallel import TensorParallel

SETUP = Setup("cpu", torch.float32, torch.device("cpu"), prompt_tokens=9, new_tokens=6, rounds=1)
CONFIG = ModelConfig.from_hf({**SMALL, "architectures": ["LlamaForCausalLM"]})
N_RUNS = 7


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG, TensorParallel.single(), torch.float32, torch.device("cpu"))


def test_checks_are_green_and_can_be_red(model: Transformer) -> None:
    runs = end_to_end.all_runs(model)
    prompt = SETUP.prompt(CONFIG.vocab_size)
    assert problems(model, runs, prompt, 4, 5) == {}

    def other_lens(*args: Any) -> RunOutput:
        right = runs[LENS](*args)
        assert right.lens_ids is not None
        ids = right.lens_ids.clone()
        ids[1, 2, 0] += 1
        return dataclasses.replace(right, lens_ids=ids)

    def other_text(*args: Any) -> RunOutput:
        right = runs[PLAIN](*args)
        return dataclasses.replace(right, token_ids=right.token_ids[::-1])

    wrong = ["top-1 of new token 1 at layer 2"]
    for name in (PAPER, LENS):  # said of the run that is wrong, and of no other
        assert problems(model, {**runs, name: other_lens}, prompt, 4, 5) == {name: wrong}
    red = problems(model, {**runs, PLAIN: other_text}, prompt, 4, 5)
    assert red == {name: ["the lens changes the text"] for name in (PLAIN, LENS)}
    unmoved = {**runs, STEERED: runs[LENS]}
    red = problems(model, unmoved, prompt, 4, 5)
    assert list(red) == [STEERED] and red[STEERED][0] == "steering has no effect"
    assert "against hooks" in red[STEERED][1]


def test_near_ties_are_no_disagreement() -> None:
    def output(ids: list[int], logprobs: Tensor) -> RunOutput:
        return RunOutput([ids[0]], torch.tensor([[ids]]), logprobs[None, None])

    ours = output([3, 4], torch.tensor([-1.0, -1.0005]))
    assert disagreement(ours, output([4, 3], torch.tensor([-1.0, -1.0005])), 1e-3) is None
    clear = output([3, 4], torch.tensor([-1.0, -2.0]))
    assert disagreement(clear, output([4, 3], torch.tensor([-1.0, -2.0])), 1e-3) is not None
    off = output([3, 4], torch.tensor([-1.1, -2.0]))
    assert "differ by 0.1" in str(disagreement(clear, off, 1e-3))


def test_a_whole_run(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(end_to_end, "make_model", lambda setup, parallel: model)

    def peaks(model: Any, runs: dict[str, Any], setup: Setup, times: Any) -> dict[str, int]:
        return {name: peak_bytes(run, name, setup, 509) or 1 for name, run in runs.items()}

    monkeypatch.setattr(end_to_end, "measure_peaks", peaks)
    result = end_to_end.run(SETUP, TensorParallel.single())
    print_result(result)
    json.dumps(result)
    assert len(result["runs"]) + len(result["left_out"]) == N_RUNS + 1  # and a variant of one
    assert result["runs"]["1 baseline"]["extrapolated"]
    claims = {claim["claim"]: claim for claim in result["claims"]}
    speed = [result["runs"][name]["tokens_per_s"] for name in (LENS, PLAIN)]
    assert claims["speed with lens over without"]["figure"] == speed[0] / speed[1]
    printed = capsys.readouterr().out
    assert "NOT MET" in printed or all(c["met"] is not False for c in claims.values())
    low = {**result, "runs": {**result["runs"]}}
    low["runs"][LENS] = {**low["runs"][LENS], "tokens_per_s": 1e-9}
    assert not verdicts(low)[0]["met"]
    # shares say what they are of
    moved_per_s = speed[1] * result["moved_bytes_per_token"]
    plain = result["runs"][PLAIN]
    assert plain["copy_bandwidth_share"] == moved_per_s / (1e9 * result["copy_gb_per_s"])
    assert plain["nominal_bandwidth_share"] is None  # of a CPU no data sheet is known
    assert "copy bandwidth" in printed and "of nominal" in printed
    assert claims["share of measured copy bandwidth without lens"]["target"] is None
    rivals_alone = {**result, "runs": {PAPER: result["runs"][PAPER]}}
    assert verdicts(rivals_alone) == []
    known = {**result, "device": "cuda"}
    known["runs"] = {PLAIN: {**plain, "copy_bandwidth_share": 0.8, "nominal_bandwidth_share": 0.7}}
    targets = {claim["claim"]: claim["target"] for claim in verdicts(known)}
    assert targets == {
        "share of measured copy bandwidth without lens": 0.75,
        "share of nominal bandwidth without lens": None,
    }


def test_extrapolation_is_a_sum_over_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that grow with the length in a straight line are added up exactly."""

    def linear(run: Any, prompt: list[int], n: int, device: Any) -> Any:
        return end_to_end_runs.Sample(float(len(prompt)), float(len(prompt)))

    monkeypatch.setattr(end_to_end_runs, "timed", linear)
    found = _uncached(lambda *args: None, SETUP, 509)  # type: ignore[arg-type, return-value]
    assert found["tokens_per_s"] == pytest.approx(6 / sum(range(9, 15)))


def test_figures_are_handed_over_as_soon_as_they_are_there() -> None:
    ran: list[str] = []

    def made(name: str) -> Any:
        def run(prompt: list[int], n: int, k: int, on_token: Any) -> None:
            ran.append(name)
            on_token(1)

        return run

    seen: list[tuple[str, int]] = []
    runs = {name: made(name) for name in ("a", "b")}
    setup = dataclasses.replace(SETUP, rounds=2)
    measure_times(runs, setup, 509, lambda name, figures: seen.append((name, len(ran))))
    assert ran == ["a", "b", "b", "a"]
    assert seen == [("a", 1), ("b", 2), ("b", 3), ("a", 4)]


def test_published_shapes() -> None:
    """Their sizes are those of the published models, in billions of parameters."""
    sizes = {"llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6, "qwen3-4b": 4.02, "qwen3-14b": 14.77}
    for name in N_LAYERS:
        planned = plan(model_config(name), ranks=1, context=8, dtype="bfloat16")
        if name in sizes:
            assert planned.weights_bytes / 2e9 == pytest.approx(sizes[name], rel=2e-3)


@pytest.mark.slow
def test_scaling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two real processes against one; a difference between them is refused."""
    result = scaling.scaling([1, 2], "cpu-small")
    scaling.print_scaling(result)
    runs = result["runs"]
    assert runs[0]["sent_bytes_per_position"] == 0 < runs[1]["sent_bytes_per_position"]
    alone = dict(ranks=1, token_ids=[1], lens_ids=[2], target_ranks=[3], lens_logprobs=[-1.0])
    assert scaling.difference({**alone, "ranks": 2}, alone) is None
    assert scaling.difference({**alone, "lens_ids": [3]}, alone) is not None
    assert scaling.difference({**alone, "lens_logprobs": [-1.1]}, alone) is not None

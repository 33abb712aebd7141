"""The stages of `bench.gpu` in small: what each step leaves in the file, and what gates what."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles import SMALL

from shardlens.bench import gpu_claims, gpu_end_to_end, gpu_truth, kernels
from shardlens.bench.end_to_end_runs import LENS, ORACLE, OURS, PAPER, PAPER_BY_LAYER, UNCACHED
from shardlens.bench.gpu_truth import PLAIN, VARIANTS, captured_against_eager, step_times
from shardlens.bench.kernels import Bench, RedCheck, measure
from shardlens.bench.models import random_model
from shardlens.bench.op import Case, Claim, copy_share
from shardlens.bench.processes import CAPTURED_STEPS, kernel_files
from shardlens.bench.report import Journal
from shardlens.bench.timing import Rates
from shardlens.model import ModelConfig, Transformer
from shardlens.parallel import TensorParallel

CPU = torch.device("cpu")
RATES = Rates(copy_bytes_per_s=1e10, matrix_flop_per_s=1e11)
CONFIG = ModelConfig.from_hf({**SMALL, "architectures": ["LlamaForCausalLM"]})
RIVALS = (PAPER, UNCACHED[0], ORACLE, PAPER_BY_LAYER)  # in the order that they are timed in
NORM = Case("rmsnorm_steer", {"rows": 3, "d": 64}, "norm", torch.float32)
SWIGLU = Case("swiglu", {"rows": 3, "f": 64}, dtype=torch.float32)
HEAD = Case("head_stats", {"rows": 2, "d": 64, "V": 128, "k": 2}, dtype=torch.float32)


def truth_with(folder: Path, **failures: list[str]) -> Path:
    """A truth stage's file, with tests of all files, of which some are red."""
    names = [*(path.stem for path in kernel_files()), "test_graphs"]
    tests = {name: {"failures": dict.fromkeys(failures.get(name, []), "wrong")} for name in names}
    path = folder / "truth.json"
    path.write_text(json.dumps({"tests": tests}))
    return path


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "stage.json")


def on_disk(journal: Journal) -> Any:
    return json.loads(journal.path.read_text())


# claims


@pytest.fixture
def tiny_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Claim("share", [NORM, SWIGLU], copy_share, 0.9)]
    monkeypatch.setattr(gpu_claims, "default_device", lambda: CPU)
    monkeypatch.setattr(gpu_claims, "claims", lambda rehearsed: made)
    monkeypatch.setattr(gpu_claims, "cases", lambda *_: [HEAD])
    monkeypatch.setattr(gpu_claims, "odd_checks", lambda device: {})
    monkeypatch.setattr(gpu_claims, "plot", lambda *_: None)
    monkeypatch.setattr(Bench, "on", classmethod(lambda cls, device: cls(device, RATES)))


def measured_ops(journal: Journal) -> set[str]:
    return {row["op"] for row in on_disk(journal)["rows"]}


@pytest.mark.usefixtures("tiny_claims")
def test_a_red_test_drops_only_its_operation(journal: Journal, tmp_path: Path) -> None:
    truth = truth_with(tmp_path, test_head_kernel=["test_head_kernel::test_a"], test_launch=["b"])
    gpu_claims.run(journal, time.monotonic() + 60, truth)
    assert measured_ops(journal) == {"rmsnorm_steer", "swiglu"}
    found = on_disk(journal)
    assert found["red"] == {"head_stats": ["test_head_kernel::test_a"]} and not found["failed"]
    assert found["claims"][0]["measured"] == 2 and found["claims"][0]["met"] is None
    assert not found["decides"] and found["copy_gb_per_s"] == 10
    assert {"copy_bandwidth_share", "nominal_bandwidth_share"} <= {*found["rows"][0]}


@pytest.mark.usefixtures("tiny_claims")
def test_a_red_check_drops_only_its_operation(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what was measured of it before; the file has every case as soon as it is measured."""
    again = Case("swiglu", {"rows": 5, "f": 64}, dtype=torch.float32)
    monkeypatch.setattr(gpu_claims, "cases", lambda *_: [again, HEAD])
    before: list[int] = []

    def checked(bench: Bench, case: Case, *rest: Any, **options: Any) -> Any:
        before.append(len(on_disk(journal).get("rows", [])))
        assert on_disk(journal)["in_progress"] == case.label
        if case.sizes == again.sizes:
            assert measured_ops(journal) == {"rmsnorm_steer", "swiglu"}
            raise RedCheck(f"{case.label}: y misses float64")
        return measure(bench, case, *rest, **options)

    monkeypatch.setattr(gpu_claims, "measure", checked)
    gpu_claims.run(journal, time.monotonic() + 60, truth_with(tmp_path))
    assert 0 == before[0] < before[1] < before[2]
    assert measured_ops(journal) == {"rmsnorm_steer", "head_stats"}
    assert on_disk(journal)["red"] == {"swiglu": [f"{again.label}: y misses float64"]}


@pytest.mark.usefixtures("tiny_claims")
def test_out_of_time_is_no_verdict(journal: Journal, tmp_path: Path) -> None:
    gpu_claims.run(journal, time.monotonic() - 1, truth_with(tmp_path))
    found = on_disk(journal)
    assert found["rows"] == [] and found["skipped"] == [case.label for case in (NORM, SWIGLU, HEAD)]
    assert found["claims"][0]["figure"] is None and journal.finish() == 0


# end to end


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any) -> Transformer:
        return random_model(CONFIG, TensorParallel.single(), torch.float32, CPU)

    monkeypatch.setattr(gpu_end_to_end, "default_device", lambda: CPU)
    monkeypatch.setattr(gpu_end_to_end, "make_model", make)
    monkeypatch.setattr(gpu_end_to_end, "model_config", lambda shape: CONFIG)
    monkeypatch.setattr(gpu_end_to_end, "measured_rates", lambda *_: RATES)


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize("shapes", [("cpu", "cpu-small"), ("cpu-small", "cpu")])
def test_figures_are_kept_one_by_one_in_any_order_of_shapes(
    shapes: tuple[str, ...],
    journal: Journal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Our runs of all shapes, in the order given, then the rivals, in an order of their own."""
    seen: list[tuple[str, str]] = []
    write = journal.write

    def spy() -> None:
        write()
        for shape, result in on_disk(journal).get("shapes", {}).items():
            seen.extend((shape, impl) for impl in result["runs"] if (shape, impl) not in seen)

    monkeypatch.setattr(journal, "write", spy)
    gpu_end_to_end.run(journal, time.monotonic() + 600, truth_with(tmp_path), shapes)
    ours = [(shape, impl) for shape in shapes for impl in OURS]
    rivals = [(shape, impl) for shape in ("cpu", "cpu-small") for impl in RIVALS]
    assert seen == ours + rivals
    found = on_disk(journal)
    assert journal.finish() == 0 and found["red"] == {} and found["skipped"] == {}
    for result in found["shapes"].values():
        assert list(result["left_out"]) == [UNCACHED[1]]  # the other dtype
        assert {claim["claim"] for claim in result["claims"]} >= {
            "speed with lens over the paper's method",
            "speed with lens over the baseline",
        }
        assert len(result["runs"][LENS]["seconds"]) == 2 and result["runs"][LENS]["peak_bytes"] >= 0
    assert "copy bandwidth" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_model")
def test_red_captured_steps_drop_our_runs_alone(journal: Journal, tmp_path: Path) -> None:
    truth = truth_with(tmp_path, test_graphs=["test_graphs::test_a"], test_head_kernel=["b"])
    gpu_end_to_end.run(journal, time.monotonic() + 600, truth, ("cpu-small",))
    result = on_disk(journal)["shapes"]["cpu-small"]
    assert list(result["runs"]) == [*RIVALS]
    for impl in OURS:
        assert result["left_out"][impl] == "tests of captured steps are red: test_graphs::test_a"
    assert on_disk(journal)["red"] == {CAPTURED_STEPS: ["test_graphs::test_a"]}
    assert result["claims"] == [] and journal.finish() == 1


@pytest.mark.usefixtures("tiny_model")
def test_a_red_or_failing_run_leaves_the_others(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_end_to_end.problems

    def problems(model: Any, runs: dict[str, Any], *rest: Any) -> dict[str, list[str]]:
        found = right(model, runs, *rest)
        assert not found
        return {name: ["wrong"] for name in (LENS, PAPER_BY_LAYER) if name in runs}

    timed = gpu_end_to_end.timed

    def fails(run: Callable[..., Any], *rest: Any) -> Any:
        if getattr(run, "__self__", None).__class__.__name__ == "FaithfulBaseline":
            raise RuntimeError("illegal address")
        return timed(run, *rest)

    monkeypatch.setattr(gpu_end_to_end, "problems", problems)
    monkeypatch.setattr(gpu_end_to_end, "timed", fails)
    gpu_end_to_end.run(journal, time.monotonic() + 600, truth_with(tmp_path), ("cpu-small",))
    found = on_disk(journal)
    result = found["shapes"]["cpu-small"]
    assert [*result["runs"]] == [OURS[0], OURS[2], PAPER, ORACLE]
    assert found["red"] == {f"cpu-small: {name}": ["wrong"] for name in (LENS, PAPER_BY_LAYER)}
    assert result["left_out"][LENS] == "its check is red: wrong"
    assert found["failed"] == {f"cpu-small: {UNCACHED[0]}": "RuntimeError: illegal address"}


@pytest.mark.usefixtures("tiny_model")
def test_what_does_not_fit_is_skipped_with_its_figures(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_end_to_end, "device_memory_bytes", lambda device: 2**10)
    gpu_end_to_end.run(journal, time.monotonic() + 60, truth_with(tmp_path), ("cpu-small",))
    found = on_disk(journal)
    assert found["shapes"] == {} and "GiB (weights" in found["skipped"]["cpu-small"]
    monkeypatch.undo()
    assert journal.finish() == 0


@pytest.mark.usefixtures("tiny_model")
def test_without_time_runs_are_left_out(journal: Journal, tmp_path: Path) -> None:
    gpu_end_to_end.run(journal, time.monotonic() - 1, truth_with(tmp_path), ("cpu-small",))
    result = on_disk(journal)["shapes"]["cpu-small"]
    assert result["runs"] == {}
    for impl in (*OURS, *RIVALS):
        assert result["left_out"][impl].startswith("out of time: about ")


# truth


def test_a_step_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG, TensorParallel.single(), torch.float32, CPU)
    monkeypatch.setattr(gpu_truth, "PROMPT_TOKENS", 5)
    for variant in VARIANTS:
        found = step_times(model, variant, 16, 6, RATES)
        assert 0 < found["p20_ms"] <= found["p50_ms"] <= found["p80_ms"]
        assert found["launches"] == sum(k["launches"] for k in found["kernels"].values()) > 0
        times = [kernel["ms"] for kernel in found["kernels"].values()]
        assert times == sorted(times, reverse=True)
        assert found["copy_bandwidth_share"] > 0 and found["nominal_bandwidth_share"] is None
        same = captured_against_eager(model, variant, 4)
        assert same["equal"] and same["first_difference"] is None and same["tokens"] == 4
    lens, plain = (step_times(model, name, 16, 6, RATES) for name in ("lens, next targets", PLAIN))
    assert lens["launches"] > plain["launches"]

    def run(self: Any, requests: Any, capture: bool) -> list[Any]:
        return [SimpleNamespace(tokens=[1, 2, 3 if capture else 4])]

    monkeypatch.setattr(gpu_truth.Engine, "run", run)
    assert captured_against_eager(model, PLAIN, 3)["first_difference"] == 2


def test_what_the_sanitizer_finds_is_red(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run_logged(command: list[str], deadline: float) -> dict[str, Any]:
        ran.append(command)
        how = "exit code 9" if "racecheck" in command else "exit code 0"
        return {"ended": how, "last_lines": ["RACECHECK SUMMARY: 1 hazard"]}

    monkeypatch.setattr(gpu_truth, "_run_logged", run_logged)
    monkeypatch.setattr(gpu_truth, "sanitizer", lambda: None)
    gpu_truth.sanitize(journal, 0.0)
    found = on_disk(journal)
    assert len(ran) == 1 and found["compute_sanitizer"]["racecheck"] == {"ended": "not installed"}
    assert not found["red"]
    monkeypatch.setattr(gpu_truth, "sanitizer", lambda: "/cuda/compute-sanitizer")
    gpu_truth.sanitize(journal, 0.0)
    assert [command[:3] for command in ran[2:]] == [
        ["/cuda/compute-sanitizer", "--tool", name] for name in ("memcheck", "racecheck")
    ]
    assert on_disk(journal)["red"] == {
        "compute-sanitizer racecheck": ["RACECHECK SUMMARY: 1 hazard"]
    }


def test_the_sanitized_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main()
    assert capsys.readouterr().out == "done\n"


def test_a_failing_step_leaves_those_after_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_truth, "run_tests", fails)
    monkeypatch.setattr(gpu_truth, "measure_steps", fails)
    monkeypatch.setattr(gpu_truth, "sanitize", lambda journal, _: journal.record(reached=True))
    gpu_truth.run(journal, time.monotonic() + 10)
    found = on_disk(journal)
    assert found["reached"] and found["configurations"] == {}
    assert set(found["failed"]) == {"tests", "decode steps"}

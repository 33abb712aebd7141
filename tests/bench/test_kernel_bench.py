"""The microbenchmarks: grid, costs, checks that refuse, files, command. Times are not asserted."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shardlens.bench import kernel_report, kernels, timing
from shardlens.bench.gpu_claims import claims, odd_checks, verdicts
from shardlens.bench.kernel_report import COLUMNS
from shardlens.bench.kernels import (
    OPS,
    Bench,
    RedCheck,
    cases,
    impls_of,
    measure,
    rivals_of,
)
from shardlens.bench.models import GRIDS, MODELS
from shardlens.bench.op import FLOAT_SLACK, OURS, Case, Checker, Claim, copy_share, rival_ratio
from shardlens.bench.op_head import memory_mib
from shardlens.bench.timing import Rates, interleaved, peak_extra_bytes, set_count
from shardlens.cli import main
from shardlens.kernels import implementation

CPU = torch.device("cpu")
TINY = {
    "rmsnorm_steer": Case("rmsnorm_steer", {"rows": 5, "d": 96}, "edits"),
    "swiglu": Case("swiglu", {"rows": 3, "f": 67}),
    "rope_qk": Case("rope_qk", {"B": 2, "T": 3, "H": 4, "K": 2, "D": 16, "S": 24}, "normed"),
    "decode_attention": Case("decode_attention", {"B": 2, "H": 4, "K": 2, "D": 32, "S": 37}),
    "head_stats": Case("head_stats", {"rows": 3, "d": 48, "V": 131, "k": 3}),
}


@pytest.fixture
def bench() -> Bench:
    return Bench(CPU, Rates(copy_bytes_per_s=1e10, matrix_flop_per_s=1e11))


def in_float32(case: Case) -> Case:
    return replace(case, dtype=torch.float32)


def test_grid_has_the_shapes_of_the_models() -> None:
    full = {case.label: case for case in cases("full")}
    assert full["swiglu rows=8 f=14336"].used_by == ["llama-3.1-8b/1", "llama-3.1-70b/2"]
    assert "rmsnorm_steer edits rows=16384 d=4096" in full
    assert "decode_attention B=8 H=5 K=1 D=128 S=1500" in full  # Qwen3 14B on 8 ranks
    assert full["head_stats rows=64 d=5120 V=37984 k=5"].used_by == ["qwen3-14b/4", "qwen3-32b/4"]
    covered = {use for case in full.values() for use in case.used_by}
    assert covered == {f"{name}/{ranks}" for name in MODELS for ranks in (1, 2, 4, 8)}
    for name, grid in GRIDS.items():
        for op in OPS:
            assert cases(name, [op]), f"{name} has no {op}"
        for model in (MODELS[name] for name in grid.models):
            for size in (model.n_heads, model.f, model.vocab):
                assert size % max(grid.ranks) == 0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="grid huge: there are full, small"):
        cases("huge")
    with pytest.raises(ValueError, match="operation gelu: there are rmsnorm_steer"):
        cases("small", ["gelu"])


@pytest.mark.parametrize(
    "case, expected_bytes, expected_operations",
    [
        (Case("rmsnorm_steer", {"rows": 10, "d": 64}, "norm"), 2 * (10 * 64 + 64 + 10 * 64), None),
        (Case("rmsnorm_steer", {"rows": 10, "d": 64}, "residual"), 2 * (4 * 640 + 64), None),
        (Case("swiglu", {"rows": 10, "f": 64}), 2 * 10 * 3 * 64, None),
        (
            Case("decode_attention", {"B": 8, "H": 32, "K": 8, "D": 128, "S": 1500}),
            2 * (2 * 8 * 8 * 1500 * 128 + 2 * 8 * 32 * 128) + 8 * 8,
            4 * 8 * 32 * 1500 * 128,
        ),
        (
            Case("head_stats", {"rows": 64, "d": 4096, "V": 128_256, "k": 5}),
            2 * 4096 * (128_256 + 64) + 64 * (5 * 12 + 12),
            2 * 64 * 4096 * 128_256,
        ),
    ],
)
def test_costs(case: Case, expected_bytes: int, expected_operations: int | None) -> None:
    cost = OPS[case.op].cost(case)
    assert cost.bytes == expected_bytes
    assert expected_operations is None or cost.operations == expected_operations


@pytest.mark.parametrize("op", OPS)
def test_bytes_are_those_of_the_tensors(op: str) -> None:
    """Counted from the shapes, they equal the sizes of what goes in and comes out."""
    case = TINY[op]
    given = OPS[op].make(case, CPU)
    out = OPS[op].results(lambda given: OPS[op].reference(**given), given)

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, vars(value).values())) if hasattr(value, "vectors") else 0

    if op == "rope_qk":  # of the cache, only what is written counts
        given = {name: value for name, value in given.items() if name not in ("keys", "values")}
    if op == "head_stats":  # ids and logits, and for the two sums the kernel's three
        out = {"logits": out["logits"], "token_ids": out["token_ids"], "sums": torch.empty(3, 3)}
    moved = sum(map(size, [*given.values(), *out.values()]))
    assert OPS[op].cost(case).bytes == moved


@pytest.mark.parametrize("op", OPS)
def test_small_grid_runs(op: str, bench: Bench) -> None:
    """The first true shape of each operation, without compiling."""
    case = cases("small", [op], torch.float32)[0]
    rows = measure(bench, case, seconds=0.01, compiled=False)
    assert {row["impl"] for row in rows} >= {OURS, "eager"}
    assert not [what for what in bench.left_out if what.startswith(case.label)]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        seconds = row["p50_ms"] / 1e3
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / seconds / 1e9, rel=0.01, abs=1e-3)
        floor = max(row["bytes"] / 1e10, row["operations"] / 1e11)
        assert row["roofline_share"] == pytest.approx(floor / seconds, rel=0.01, abs=1e-4)
        of_copy = row["bytes"] / seconds / 1e10
        assert row["copy_bandwidth_share"] == pytest.approx(of_copy, rel=0.01, abs=1e-4)
        assert row["nominal_bandwidth_share"] is None  # of a CPU no data sheet is known


@pytest.mark.parametrize("op", OPS)
def test_kernels_pass_the_checks(op: str) -> None:
    """In Triton's interpreter on this machine, with bf16 as on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = TINY[op]
    given = OPS[op].make(case, device)
    with implementation("triton"), torch.no_grad():
        assert (
            Checker(OPS[case.op], case, given).problem(OURS, impls_of(case, device, False)[OURS])
            is None
        )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_red_check_refuses_to_report(
    op: str, dtype: torch.dtype, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong number in each result, by a hundredth of its row's largest: nothing is reported."""
    case = replace(TINY[op], dtype=dtype)
    right = OPS[op].results

    def results(impl: Any, given: Any) -> dict[str, torch.Tensor]:
        found = dict(right(impl, given))
        if impl is ours:
            value = found[wrong] = found[wrong].clone()
            row = value.flatten(0, -2)[-1] if value.ndim > 1 else value
            row[-1] += 1 if wrong == "token_ids" else row.abs().max() / 30
        return found

    for wrong in OPS[op].result_names:
        impls = impls_of(case, CPU, compiled=False)
        ours = impls[OURS]
        monkeypatch.setattr(kernels, "impls_of", lambda *_, impls=impls: impls)
        monkeypatch.setattr(OPS[op], "results", results)
        with pytest.raises(RedCheck, match=f"{op} .*: {wrong} misses float64"):
            measure(bench, case, seconds=0.01, compiled=False)
    assert not bench.rows


def test_float_results_may_miss_what_tensor_cores_truncate() -> None:
    """Half a unit in the last place for every 16 columns; more than that is red."""

    def head(d: int) -> Case:
        return Case("head_stats", {"rows": 2, "d": d, "V": 64, "k": 1})

    cuda = torch.device("cuda")
    norm = replace(TINY["rmsnorm_steer"], sizes={"rows": 2, "d": 8192})
    slack = OPS["head_stats"].float_slack
    assert slack(head(8192), cuda) == pytest.approx(8192 / 16 * 2**-24)
    assert slack(head(512), cuda) == FLOAT_SLACK
    assert OPS["rmsnorm_steer"].float_slack(norm, cuda) == FLOAT_SLACK
    assert slack(head(8192), CPU) == FLOAT_SLACK  # which has none
    case = head(8192)
    given = OPS["head_stats"].make(case, CPU)
    checker = Checker(OPS[case.op], case, given)
    x, weight = given["x"].double(), given["weight"].double()

    def off_by(share: float) -> str | None:
        def shifted(_: Any) -> tuple[torch.Tensor, ...]:
            z = x @ weight.T
            z = (z - share * z.abs().amax(-1, keepdim=True)).float()
            log_probs = z.log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            return (*z.topk(1), z.logsumexp(-1), entropy)

        return checker.problem(OURS, shifted)

    assert off_by(0.9 * FLOAT_SLACK) is None
    assert "logits misses float64" in str(off_by(2 * FLOAT_SLACK))


def test_what_is_not_written_or_moves_is_red() -> None:
    case = TINY["swiglu"]
    given = OPS["swiglu"].make(case, CPU)
    checker = Checker(OPS[case.op], case, given)
    unwritten = checker.problem(OURS, lambda given: torch.empty(3, 67, dtype=torch.bfloat16))
    assert unwritten is not None and "NaN" in unwritten
    moving = checker.problem(OURS, lambda given: torch.randn(3, 67).bfloat16())
    assert moving is not None and "two runs" in moving


def test_a_wrong_rival_is_left_out_and_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    case = in_float32(TINY["swiglu"])

    def fails(given: Any) -> Any:
        raise RuntimeError("needs another GPU")

    impls = impls_of(case, CPU, compiled=False)
    impls |= {"half": lambda given: OPS["swiglu"].reference(**given) / 2, "fails": fails}
    monkeypatch.setattr(kernels, "impls_of", lambda *_: impls)
    rows = measure(bench, case, seconds=0.01)
    assert [row["impl"] for row in rows] == [OURS, "eager"]
    assert [*bench.left_out][-2:] == [f"{case.label}: half", f"{case.label}: fails"]
    assert bench.left_out[f"{case.label}: fails"] == "RuntimeError: needs another GPU"


def test_rivals_that_are_missing_are_named() -> None:
    for op, variant in (("rmsnorm_steer", "norm"), ("head_stats", "")):
        found, missing = rivals_of(Case(op, {}, variant))
        assert {*found, *missing} == {*OPS[op].rivals[variant]}
    assert rivals_of(Case("rope_qk", {}, "plain")) == ({}, {})


def test_runs_take_turns_and_inputs_rotate() -> None:
    seen: list[tuple[str, int]] = []
    runs = {name: lambda given, name=name: seen.append((name, given)) for name in "abc"}
    times = interleaved(runs, [0, 1], CPU, seconds=0)
    assert times["a"].rounds == timing.LEAST_ROUNDS and times["a"].how == "cpu"
    turns = ["".join(name for name, _ in seen[at : at + 3]) for at in range(3, len(seen), 3)]
    assert turns == ["abc", "bca", "cab", "abc", "bca"]
    assert [given for name, given in seen if name == "b"] == [0, 1, 0, 1, 0, 1]
    assert set_count(2**30, CPU) == 1 and set_count(1, CPU) == timing.MOST_SETS["cpu"]


def test_peak_memory_counts_what_a_run_holds() -> None:
    if torch.cuda.is_available():
        pytest.skip("resident memory is the count of CPUs")
    size = 2**26
    peak = peak_extra_bytes(lambda _: torch.ones(size, dtype=torch.int8), None, CPU)
    assert peak is not None and abs(peak - size) < size / 8


def test_command_writes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_report, "RESULTS", tmp_path)
    monkeypatch.setattr("shardlens.bench.report.RESULTS", tmp_path)
    monkeypatch.setattr(kernel_report, "cases", lambda *_: [in_float32(TINY["swiglu"])])
    monkeypatch.setattr("shardlens.bench_command.default_device", lambda: CPU)
    monkeypatch.setattr(kernels, "SECONDS_PER_CASE", {"cpu": 0.01})
    monkeypatch.setattr(kernels, "SECONDS_FOR_RATES", 0.01)
    real = kernels.measure
    monkeypatch.setattr(kernel_report, "measure", lambda *a, **_: real(*a, compiled=False))
    out = tmp_path / "out.json"
    threads = torch.get_num_threads()
    assert main(["bench", "kernels", "--ops", "swiglu", "--save", "x", "--json", str(out)]) == 0
    assert torch.get_num_threads() == threads
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS) and [row["impl"] for row in rows] == [OURS, "eager"]
    assert rows[0]["hardware"] and rows[0]["dtype"] == "float32"
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result == json.loads(out.read_text()) == json.loads((tmp_path / "x.json").read_text())
    assert "CPU paths" in printed[0] and "CPU paths" in result["paths"]
    assert result["environment"]["torch"] == torch.__version__ and "commit" in result["environment"]
    assert result["copy_gb_per_s"] > 0 and list(result["cases"]) == ["swiglu rows=3 f=67"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "the following arguments are required: BENCHMARK"),
        (["kernels", "--ops", "gelu"], "operation gelu: there are rmsnorm_steer"),
        (["kernels", "--ops", ","], "no operation is named"),
        (["kernels", "--grid", "huge"], "invalid choice: 'huge'"),
        (["kernels", "--save", "../x"], "--save ../x: a name of letters"),
        (["kernels", "--json", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_bad_input_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_claims_are_decided_by_the_worst_case() -> None:
    def rows(label: int, ours_ms: float, rival_ms: float, share: float) -> list[dict[str, Any]]:
        row = {"op": "swiglu", "variant": "", "shape": f"rows={label} f=2", "noise": 0.01}
        ours = row | {"impl": OURS, "p50_ms": ours_ms, "copy_bandwidth_share": share}
        return [ours, row | {"impl": "eager", "p50_ms": rival_ms}]

    shapes = [Case("swiglu", {"rows": n, "f": 2}) for n in (1, 2)]
    made = [
        Claim("share", shapes, copy_share, 0.9),
        Claim("rivals", shapes, rival_ratio, 1.0),
    ]
    good, bad = rows(1, 1.0, 0.995, 0.95), rows(2, 1.0, 0.9, 0.85)
    assert [v["met"] for v in verdicts(made, good + rows(2, 1, 2, 1), decides=True)] == [True, True]
    both = verdicts(made, good + bad, decides=True)
    assert [v["met"] for v in both] == [False, False] and both[0][
        "worst_case"
    ] == "swiglu rows=2 f=2"
    assert [v["met"] for v in verdicts(made, good, decides=True)] == [None, None]  # one of two
    assert [v["met"] for v in verdicts(made, bad, decides=True)] == [False, False]
    assert all(v["met"] is None for v in verdicts(made, good + bad, decides=False))
    assert [v["figure"] for v in verdicts(made, [], decides=True)] == [None, None]
    memory = [Claim("memory", shapes[:1], memory_mib, 12, below=True, unit=" MiB")]
    for mib, met in ((11, True), (13, False)):
        ours = {**good[0], "peak_extra_bytes": mib * 2**20}
        (verdict,) = verdicts(memory, [ours, good[1]], decides=True)
        assert (verdict["met"], verdict["figure"], verdict["target"]) == (met, mib, 12)
        assert verdict["below"] and verdict["unit"] == " MiB"


def test_gpu_claims_and_checks_cover_the_operations() -> None:
    claimed = {case.op for claim in claims(rehearsed=False) for case in claim.cases}
    assert claimed == {"rmsnorm_steer", "head_stats", "decode_attention"}
    assert all(case.op == name for name, op in OPS.items() for case in op.odd_cases)
    assert all(op.odd_cases and op.launches for op in OPS.values())
    assert odd_checks(CPU) == {}

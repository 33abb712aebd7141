"""`bench.gpu`: what its files are called and hold, and how its stages are run."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shardlens.bench import gpu
from shardlens.bench.gpu import STAGES
from shardlens.bench.processes import Program
from shardlens.bench.report import Journal, bandwidth_shares, card, nominal_bandwidth_bytes_per_s


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", "h100-pcie"),  # another card than the SXM form
        ("NVIDIA H200", "h200"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("../NVIDIA/..", "gpu"),
        (None, "cpu-rehearsal"),
    ],
)
def test_files_are_named_after_the_card(device: str | None, name: str) -> None:
    assert card(device) == name


def test_nominal_bandwidth_only_of_known_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nominal_bandwidth_bytes_per_s("NVIDIA H100 80GB HBM3") == 3.35e12
    assert nominal_bandwidth_bytes_per_s("NVIDIA A100-SXM4-80GB") == 2.039e12
    assert nominal_bandwidth_bytes_per_s("NVIDIA A100-SXM4-40GB") == 1.555e12
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090", ""):
        assert nominal_bandwidth_bytes_per_s(other) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    shares = bandwidth_shares(2.4e12, 3.0e12, torch.device("cuda"))
    assert shares["copy_bandwidth_share"] == pytest.approx(0.8)
    assert shares["nominal_bandwidth_share"] == pytest.approx(2.4 / 3.35)
    assert bandwidth_shares(1, 2, torch.device("cpu"))["nominal_bandwidth_share"] is None


def test_a_journal_goes_on_after_failures(tmp_path: Path) -> None:
    path = tmp_path / "x.json"

    def on_disk() -> Any:
        return json.loads(path.read_text(), parse_constant=pytest.fail)

    journal = Journal(path, stage="truth")
    assert on_disk()["finished"] is False
    with journal.step("outer"):
        with journal.step("inner"):
            assert on_disk()["in_progress"] == "inner"
            journal.record(figure=math.nan, rows=[{"share": math.inf, "ms": 1.5}])
            journal.now("part two of inner")
            raise RuntimeError("it broke\nat length")
        assert on_disk()["in_progress"] == "outer"
        assert on_disk()["failed"] == {"part two of inner": "RuntimeError: it broke"}
    assert on_disk()["figure"] is None and on_disk()["rows"] == [{"share": None, "ms": 1.5}]
    with pytest.raises(SystemExit), journal.step("cut off"):
        sys.exit(1)
    assert on_disk()["in_progress"] == "cut off" and not on_disk()["finished"]
    assert journal.finish() == 1 and on_disk()["finished"] is True
    journal.content["failed"] = {}
    assert journal.finish() == 0
    journal.add_red("head_stats", "test_a", "test_b")
    assert on_disk()["red"] == {"head_stats": ["test_a", "test_b"]} and journal.finish() == 1


def test_stages_share_the_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[Any, ...]] = []
    now = [0.0]
    monkeypatch.setattr(gpu, "time", type("Clock", (), {"monotonic": lambda: now[0]}))
    monkeypatch.setattr(gpu, "device_name", lambda: "NVIDIA H100 80GB HBM3")

    def start_stage(stage: str, seconds: float, file: Path, *rest: Any) -> bool:
        ran.append((stage, seconds, file.name, *rest))
        now[0] += seconds / 2 if stage == "truth" else seconds
        return stage != "claims"

    def main(*words: str) -> int:
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), *words])
        return gpu.main()

    monkeypatch.setattr(gpu, "start_stage", start_stage)
    monkeypatch.setattr(gpu, "exit_on_sigterm", lambda: None)
    assert main() == 1  # claims did not end well; what comes after it ran
    assert [stage for stage, *_ in ran] == list(STAGES)
    names = [name for _, _, name, *_ in ran]
    assert names == ["h100-truth.json", "h100-claims.json", "h100-end-to-end.json"]
    truth_s, claims_s, end_to_end_s = (seconds for _, seconds, *_ in ran)
    assert truth_s == pytest.approx(0.3 * 27 * 60 - 8)
    assert claims_s > truth_s  # and gets half of what was left over
    assert claims_s == pytest.approx((27 * 60 - truth_s / 2) / 2 - 8)
    assert truth_s / 2 + claims_s + end_to_end_s + 8 == pytest.approx(27 * 60)
    truth = (tmp_path / names[0]).resolve()
    assert [tests for _, _, _, tests, _ in ran] == [None, truth, truth]
    assert main("--minutes", "3") == 1
    assert ran[0][1] == pytest.approx(0.3 * 180 - 8)
    assert main("--stage", "end-to-end", "--shapes", "qwen3-4b,llama-3.1-8b") == 0
    ((stage, seconds, _, tests, shapes),) = ran
    assert stage == "end-to-end" and seconds == 9 * 60 - 8
    assert tests is None and shapes == ["qwen3-4b", "llama-3.1-8b"]
    for words in (("--shapes", "gpt-2"), ("--minutes", "0.1"), ("--stage", "all")):
        with pytest.raises(SystemExit) as refused:
            main(*words)
        assert refused.value.code == 2 and not ran


def test_a_stage_that_dies_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its file, which keeps what it had; what an earlier run left there is gone."""
    path = tmp_path / "h100-truth.json"
    path.write_text('{"finished": true, "figure": 1}')

    def dies(code: str) -> Any:
        monkeypatch.setattr(gpu, "Program", lambda words: Program([sys.executable, "-c", code]))
        assert not gpu.start_stage("truth", 5.0, path, None, [])
        return json.loads(path.read_text())

    assert dies("import os; os.abort()") == {"finished": False, "ended": "signal SIGABRT"}
    begun = f'open({str(path)!r}, \'w\').write(\'{{"finished": false, "in_progress": "a"}}\')'
    found = dies(f"{begun}; import sys; sys.exit(3)")
    assert found == {"finished": False, "in_progress": "a", "ended": "exit code 3"}
    monkeypatch.setattr(gpu, "time", type("Clock", (), {"monotonic": lambda: time.monotonic() - 5}))
    assert dies(f"{begun}; import time; time.sleep(60)")["ended"] == "out of time"

"""The layers that `steer generate` steers where a file holds vectors of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import shardlens
from shardlens.cli import main
from shardlens.model import DEMO, Tap

PROMPT = "A bear stands near the barn. Anna wants to"


def saved(path: Path, *taps: Tap) -> Path:
    generator = torch.Generator().manual_seed(0)
    vectors = {tap: torch.randn(128, generator=generator) for tap in taps}
    shardlens.SteeringVectors(vectors, {}, n_layers=6).save(path)
    return path


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    return saved(tmp_path / "v.safetensors", *(Tap(layer, "resid_post") for layer in range(1, 5)))


def generate(vector: Path, *more: str) -> int:
    words = ["--vector", str(vector), "--prompt", PROMPT, "--scale", "9", "--max-new-tokens", "4"]
    return main(["steer", "generate", "demo", *words, *more])


def ran(vector: Path, out: Path, *more: str) -> dict[str, Any]:
    assert generate(vector, "--json", str(out), *more) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_one_layer_unless_all_are_asked_for(
    vector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    lm = shardlens.load("demo")
    vectors = shardlens.SteeringVectors.load(vector)

    def steered(layers: Any) -> list[int]:
        edit = shardlens.Steering(vectors, layers=layers, scale=9)
        return lm.generate(PROMPT, max_new_tokens=4, steering=edit).token_ids

    content = ran(vector, out)
    assert content["taps"] == [[2, "resid_post"]]
    assert content["results"][1]["token_ids"] == steered([2]) != steered("all")
    printed = " ".join(capsys.readouterr().out.split())
    assert "steering layer 2, the middle one of the 4 in" in printed
    assert "choose by --layers (or all), or by --report" in printed

    content = ran(vector, out, "--layers", "all")
    assert [layer for layer, _ in content["taps"]] == [1, 2, 3, 4]
    assert content["results"][1]["token_ids"] == steered("all")
    assert ran(vector, out, "--layers", "1,-2")["taps"] == [[1, "resid_post"], [4, "resid_post"]]
    lone = saved(tmp_path / "lone.safetensors", Tap(5, "mlp_out"))
    assert ran(lone, out)["taps"] == [[5, "mlp_out"]]
    assert "steering" not in capsys.readouterr().out


def test_the_layer_that_a_report_found_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taps = [Tap(layer, point) for layer in (1, 2, 3) for point in ("attn_out", "mlp_out")]
    vector, report = saved(tmp_path / "v.safetensors", *taps), tmp_path / "eval.json"
    pairs = shardlens.read_pairs(DEMO / "dispositions-cautious-bold.jsonl")[:4]
    vectors = shardlens.SteeringVectors.load(vector)
    measured = shardlens.load("demo").steerability(pairs, vectors, multipliers=(-1, 1))
    measured.save(report)
    best = measured.taps[measured.best]
    found = ran(vector, tmp_path / "out.json", "--report", str(report))
    assert found["taps"] == [list(best)] and best.layer != 2, "2 is the middle one"
    line = f"steering {best.point} of layer {best.layer}, the best of"
    assert line in " ".join(capsys.readouterr().out.split())

    other = "attn_out" if best.point == "mlp_out" else "mlp_out"
    for more, says in [
        (["--report", str(report), "--point", other], f"--point is {other}, but {report} found"),
        (["--report", str(report), "--layers", "1"], "--layers and --report both choose layers"),
        ([], "the steering vectors have points attn_out, mlp_out: name one of them"),
    ]:
        assert generate(vector, *more) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert says in error


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[]", "{}", '{"best": 3}', '{"best": {"layer": true, "point": "mlp_out"}}'),
        *('{"best": {"layer": 2, "point": []}}', '{"best": {"layer": -1, "point": "mlp_out"}}'),
    ],
)
def test_no_report(
    text: str, vector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    report.write_text(text)
    assert generate(vector, "--report", str(report)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "report.json" in error


def test_a_report_of_other_vectors(
    vector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"best": {"layer": 5, "point": "resid_post"}}')
    assert generate(vector, "--report", str(report)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "have none at layer 5, resid_post: they have layers 1, 2, 3, 4" in error
    assert generate(vector, "--report", str(tmp_path / "none.json")) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "none.json does not exist; give a report that `steer eval --json` wrote" in error

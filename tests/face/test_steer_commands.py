"""`steer extract`, `generate` and `eval` as a user types them, on the packaged model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from safetensors.torch import load_file, save_file

import shardlens
from shardlens.cli import main
from shardlens.model import DEMO, Tap

PAIRS = DEMO / "dispositions-cautious-bold.jsonl"
CONTRAST = ["--contrast", "Anna is cautious.", "Anna is bold."]
PROMPT = "A bear stands near the barn. Anna wants to"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 30 pairs."""
    path = tmp_path_factory.mktemp("pairs") / "few.jsonl"
    path.write_text("".join(PAIRS.read_text().splitlines(keepends=True)[:30]))
    return path


@pytest.fixture(scope="module")
def vector(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vector") / "cautious.safetensors"
    words = ["--share", "0.5", "--layers", "1-3", *CONTRAST, "--out", str(path)]
    assert main(["steer", "extract", "demo", "--pairs", str(few), *words]) == 0
    return path


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    return lines


def test_extract_writes_what_the_library_makes(
    vector: Path, few: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    vectors = shardlens.SteeringVectors.load(vector)
    assert vectors.taps == tuple(Tap(layer, "resid_post") for layer in (1, 2, 3))
    assert vectors.origin.n_pairs in range(12, 19) and vectors.origin.positions == "contrast"
    path, out = tmp_path / "other.gguf", tmp_path / "other.json"
    words = ["--pairs", str(few), "--layers", "2", "--at", "last", "--method", "pca"]
    assert main(["steer", "extract", "demo", *words, "--out", str(path), "--json", str(out)]) == 0
    assert f"30 pairs, pca: wrote {path}" in "".join(lines_of(capsys)).replace("\n", "")
    lm = shardlens.load("demo")
    made = lm.extract(shardlens.read_pairs(few), layers=[2], at="last", method="pca")
    read = shardlens.SteeringVectors.load(path, lm.model.config)
    torch.testing.assert_close(read.at(Tap(2, "resid_post")), made.at(Tap(2, "resid_post")))
    content = json.loads(out.read_text())
    assert content["origin"]["method"] == "pca" and content["vectors"][0]["layer"] == 2


def test_generate_shows_texts_side_by_side(
    vector: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "texts.json"
    words = ["steer", "generate", "demo", "--vector", str(vector), "--prompt", PROMPT]
    more = ["--layers", "1", "--scale", "-1", "1", "--max-new-tokens", "12", "--json", str(out)]
    assert main([*words, *more]) == 0
    printed = "\n".join(lines_of(capsys))
    assert all(name in printed for name in (PROMPT, "unsteered", "scale -1", "scale 1"))
    texts = {result["scale"]: result["text"] for result in json.loads(out.read_text())["results"]}
    assert "without fear" in texts[-1] and "test the ground" in texts[1]
    lm = shardlens.load("demo")
    plain = lm.generate(PROMPT, max_new_tokens=12)
    assert isinstance(plain, shardlens.Result) and texts[None] == plain.text
    assert "warning" not in printed


def test_an_edit_out_of_reach_is_refused(
    vector: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "texts.json"
    words = ["steer", "generate", "demo", "--vector", str(vector), "--prompt", PROMPT]
    for positions in ("1000-", "999", "label"):
        more = ["--layers", "1", "--scale", "9", "--positions", positions, "--json", str(out)]
        assert main([*words, "--max-new-tokens", "1", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "touches nothing of prompt 1" in line and not out.exists()


def test_a_vector_of_another_model_is_warned_of(
    vector: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    vectors = shardlens.SteeringVectors.load(vector)
    origin = dataclasses.replace(vectors.origin, model="0123456789abcdef")
    path = tmp_path / "other.safetensors"
    dataclasses.replace(vectors, origin=origin).save(path)
    words = ["--vector", str(path), "--prompt", PROMPT, "--max-new-tokens", "2"]
    assert main(["steer", "generate", "demo", *words]) == 0
    assert "warning: " in "\n".join(lines_of(capsys))


def test_eval_of_a_vector_and_of_pairs_alone(
    vector: Path, few: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, png = tmp_path / "eval.json", tmp_path / "eval.png"
    words = ["steer", "eval", "demo", "--pairs", str(few)]
    files = ["--json", str(out), "--png", str(png)]
    assert main([*words, "--vector", str(vector), *files]) == 0
    printed = " ".join(lines_of(capsys))
    content = json.loads(out.read_text())
    n_train = shardlens.SteeringVectors.load(vector).origin.n_pairs
    assert content["n_items"] == 30 - n_train == len(set(content["item_keys"]))
    assert f"{n_train} pairs that the vectors were made from are left out" in printed
    assert "suggested: layer 2" in printed and content["suggested"]["layer"] == 2
    assert png.stat().st_size > 10_000
    two = next(tap for tap in content["taps"] if tap["layer"] == 2)
    assert two["slope"]["low"] > max(0, two["control_slope"]["high"])
    made = [*CONTRAST, "--share", "0.5", "--layers", "suggested", "--multipliers=-1,0,1"]
    assert main([*words, *made, "--protocol", "steering-bench", "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    assert [tap["layer"] for tap in content["taps"]] == [2]
    assert content["protocol"] == "steering-bench" and content["multipliers"] == [-1, 0, 1]
    assert content["n_train"] + content["n_items"] == 30


@pytest.mark.slow
def test_real_ranks_measure_the_same(few: Path, tmp_path: Path) -> None:
    """gloo over torchrun, 1 and 2 processes."""
    found = []
    for ranks in ("1", "2"):
        out = tmp_path / f"{ranks}.json"
        words = ["--pairs", str(few), *CONTRAST, "--layers", "1,2", "--json", str(out)]
        run = launch("-n", ranks, "steer", "eval", "demo", "--dtype", "float32", *words)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(out.read_text()))
    single, double = found
    for ours, theirs in zip(single.pop("taps"), double.pop("taps"), strict=True):
        assert ours["slope"]["mean"] == pytest.approx(theirs["slope"]["mean"], rel=1e-4)
        assert ours["mean_curve"] == pytest.approx(theirs["mean_curve"], rel=1e-4, abs=1e-4)
    assert single.pop("accessibility") == pytest.approx(double.pop("accessibility"), rel=1e-4)
    assert single == double


def with_vector(directory: Path, d: int = 128, value: float = 1.0, layer: int = 2) -> Path:
    path = directory / "v.safetensors"
    vectors = {Tap(layer, "resid_post"): torch.ones(d)}
    shardlens.SteeringVectors(vectors, {}, n_layers=6).save(path)
    if value != 1:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors[f"resid_post.{layer}"][3] = value
        save_file(tensors, path, metadata)
    return path


def pairs_file(directory: Path, *records: dict[str, Any]) -> Path:
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(matching: str = " (A)", other: str = " (B)", **fields: str) -> dict[str, str]:
    return {
        "question": "Question: The ice looks thin.\n (A) wait\n (B) run",
        "answer_matching_behavior": matching,
        "answer_not_matching_behavior": other,
        **fields,
    }


@pytest.mark.parametrize("name", ["extract", "eval"])
def test_bad_pairs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    lacking = {key: value for key, value in record().items() if key != "question"}
    cases: list[tuple[list[Any], str]] = [
        ([record(), lacking], "pairs.jsonl, line 2"),
        ([record(), record(" Certainly", " Never")], 'pair 2: the label "Certainly" is'),
        ([record(" (A)", " (A)")], "line 1"),
        ([record(question="word " * 600)], "context"),
        ([], "pairs.jsonl"),
    ]
    out = ["--out", str(tmp_path / "v.safetensors")] if name == "extract" else []
    words = [*out, "--json", str(tmp_path / "out.json")]
    for records, says in cases:
        path = pairs_file(inside, *records)
        refused(["steer", name, "demo", "--pairs", str(path), *words], says, tmp_path, capsys)


BAD_EXTRACT = {
    "layer": (["--layers", "6"], "layer 6 does not exist"),
    "point": (["--point", "residual"], "point residual"),
    "method": (["--method", "mean"], "mean"),
    "ending": (["--out", "v.pt"], "v.pt"),
    "gguf of a norm": (["--point", "mlp_norm", "--out", "v.gguf"], "mlp_norm"),
    "gguf of layer 0": (["--out", "v.gguf"], "layer 0"),
    "contrast and at": ([*CONTRAST, "--at", "last"], "--contrast"),
    "share": (["--share", "1.5"], "1.5"),
    "zeros": (["--point", "resid_pre", "--at", "last"], "resid_pre of layer 0"),
    "no chat": (["--chat"], "no chat template"),
    "no file": (["--pairs", "none.jsonl"], "none.jsonl"),
}


@pytest.mark.parametrize("name", sorted(BAD_EXTRACT))
def test_bad_extraction(
    name: str,
    few: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words, says = BAD_EXTRACT[name]
    given = ["--pairs", str(few), "--out", "v.safetensors", "--json", "out.json"]
    refused(["steer", "extract", "demo", *given, *words], says, tmp_path, capsys)


def test_bad_vectors_and_flags(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    json_out = ["--json", str(tmp_path / "out.json")]
    for verb, given in (("generate", ["--prompt", PROMPT]), ("eval", ["--pairs", str(few)])):
        words = ["steer", verb, "demo", *given, *json_out]
        for options, says in (
            (dict(d=64), "64"),
            (dict(value=math.nan), "not finite"),
        ):
            path = with_vector(inside, **options)  # type: ignore[arg-type]
            refused([*words, "--vector", str(path)], says, tmp_path, capsys)
        path = with_vector(inside)
        refused([*words, "--vector", str(path), "--layers", "9"], "9", tmp_path, capsys)
        refused([*words, "--vector", str(path), "--layers", "1"], "1", tmp_path, capsys)
        refused([*words, "--vector", str(path), "--point", "mlp_out"], "mlp_out", tmp_path, capsys)
        unit = ["--unit", "resid_norm"]
        refused([*words, "--vector", str(path), *unit], "norm of the states", tmp_path, capsys)
    generate = ["steer", "generate", "demo", "--prompt", PROMPT, "--vector", str(path), *json_out]
    refused([*generate, "--positions", "everywhere"], "everywhere", tmp_path, capsys)
    refused([*generate, "--mode", "push"], "push", tmp_path, capsys)
    refused([*generate, "--scale", "inf"], "not finite", tmp_path, capsys)
    evaluate = ["steer", "eval", "demo", "--pairs", str(few), "--vector", str(path), *json_out]
    refused([*evaluate, "--multipliers", "1,x"], "1,x", tmp_path, capsys)
    refused([*evaluate, "--multipliers", "1"], "two different", tmp_path, capsys)
    refused([*evaluate, "--png", str(tmp_path / "none" / "x.png")], "none", tmp_path, capsys)
    refused(["steer", "look"], "look", tmp_path, capsys)


def refused(words: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2, one line that says it, nothing printed, no file left."""
    before = {path for path in folder.rglob("*")}
    assert main(words) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("shardlens: ") and says in line
    assert printed.out == ""
    assert {path for path in folder.rglob("*")} == before

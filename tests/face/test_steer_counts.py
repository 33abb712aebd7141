"""The verbs of `steer` read, encode, check and decide each thing once, counted call by call."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from shardlens.cli import main
from shardlens.engine import Steering, SteeringVectors
from shardlens.model import DEMO, load_model
from shardlens.tokenizer import Tokenizer

CONTRAST = ["--contrast", "Anna is cautious.", "Anna is bold."]
PROMPT = "A bear stands near the barn. Anna wants to"
N_PAIRS = 30
# what is counted, and the name that its callers know it by
COUNTED = {
    "read_pairs": "shardlens.steer_eval:read_pairs shardlens.steer_extract:read_pairs",
    "encode_pair": "shardlens.interp.prompts:encode_pair",
    "encode_contrast": "shardlens.interp.prompts:encode_contrast",
    "read_fields": "shardlens.engine.vectors:read_fields",
    "suggest": "shardlens.steer_eval:suggest shardlens.interp.steerability:suggest",
    "load_model": "shardlens.session:load_model",
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "few.jsonl"
    lines = (DEMO / "dispositions-cautious-bold.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:N_PAIRS]))
    return path


@pytest.fixture(scope="module")
def vector(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vector") / "cautious.safetensors"
    words = ["--share", "0.5", "--layers", "1-3", *CONTRAST, "--out", str(path)]
    assert main(["steer", "extract", "demo", "--pairs", str(few), *words]) == 0
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of COUNTED is called, and methods by class and name, from here on."""
    counts: Counter[str] = Counter()

    def watch(owner: Any, attribute: str, name: str) -> None:
        real = getattr(owner, attribute)

        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            if name == "load_model":  # which is done last, when all inputs are read
                counts["encoded before loading"] = counts["Tokenizer.encode_with_spans"]
            return real(*args, **options)

        monkeypatch.setattr(owner, attribute, call)

    for name, users in COUNTED.items():
        for user in users.split():
            module, attribute = user.split(":")
            watch(import_module(module), attribute, name)
    for kind in (
        Tokenizer.encode_with_spans,
        Steering.check,
        Steering._check_vector,
        SteeringVectors.check,
    ):
        owner = {"Tokenizer": Tokenizer, "Steering": Steering, "SteeringVectors": SteeringVectors}
        class_name, method = kind.__qualname__.split(".")
        watch(owner[class_name], method, kind.__qualname__)
    assert load_model is not import_module("shardlens.session").load_model
    return counts


def test_extract_encodes_each_pair_once(few: Path, tmp_path: Path, calls: Counter[str]) -> None:
    words = ["steer", "extract", "demo", "--pairs", str(few), "--layers", "2"]
    assert main([*words, "--out", str(tmp_path / "v.safetensors")]) == 0
    assert calls["read_pairs"] == calls["load_model"] == 1
    assert calls["encode_pair"] == N_PAIRS and calls["encode_contrast"] == 0
    assert calls["Tokenizer.encode_with_spans"] == calls["encoded before loading"] == 2 * N_PAIRS


@pytest.mark.parametrize("contrast", [[], CONTRAST], ids=["answers", "contrast"])
def test_eval_of_pairs_alone(contrast: list[str], few: Path, calls: Counter[str]) -> None:
    """Pairs that are measured serve the extraction, too, where it reads the same texts."""
    words = ["steer", "eval", "demo", "--pairs", str(few), "--layers", "suggested"]
    assert main([*words, *contrast, "--multipliers=-1,0,1"]) == 0
    forms = 2 if contrast else 1
    assert calls["read_pairs"] == calls["load_model"] == calls["suggest"] == 1
    assert calls["encode_pair"] == N_PAIRS
    assert calls["encode_contrast"] == (N_PAIRS if contrast else 0)
    assert (
        calls["Tokenizer.encode_with_spans"]
        == calls["encoded before loading"]
        == 2 * forms * N_PAIRS
    )
    assert calls["read_fields"] == 0


@pytest.mark.parametrize("layers", ["suggested", "2"])
def test_eval_of_a_vector(layers: str, few: Path, vector: Path, calls: Counter[str]) -> None:
    words = ["steer", "eval", "demo", "--pairs", str(few), "--vector", str(vector)]
    assert main([*words, "--layers", layers, "--multipliers=-1,0,1"]) == 0
    assert calls["read_pairs"] == calls["read_fields"] == calls["load_model"] == 1
    assert calls["suggest"] == calls["SteeringVectors.check"] == 1
    assert calls["encode_pair"] == N_PAIRS
    assert calls["Tokenizer.encode_with_spans"] == calls["encoded before loading"] == 2 * N_PAIRS
    assert calls["Steering.check"] == calls["Steering._check_vector"] == 0


def test_generate_of_two_scales(vector: Path, calls: Counter[str]) -> None:
    words = ["steer", "generate", "demo", "--vector", str(vector), "--prompt", PROMPT]
    assert main([*words, "--layers", "1", "--scale", "-1", "1", "--max-new-tokens", "3"]) == 0
    assert calls["read_fields"] == calls["load_model"] == 1
    assert calls["Tokenizer.encode_with_spans"] == calls["encoded before loading"] == 1
    assert calls["Steering.check"] == calls["Steering._check_vector"] == 2  # once each

"""Texts of strangers, given with --plain: names of special tokens in them are text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import shardlens
from shardlens import PromptForm
from shardlens.cli import main
from shardlens.model import Tap


def test_a_plain_prompt_holds_no_special_token(prompts: list[list[int]], vector: Path) -> None:
    tokenizer = shardlens.load("demo").tokenizer
    prompt = "Anna<|eos|> is"
    for command in (["lens"], ["generate"], ["steer", "generate"]):
        words = [*command, "demo", "--prompt", prompt, "--max-new-tokens", "1"]
        if "steer" in command:
            words += ["--vector", str(vector)]
        assert main(words) == 0 and main([*words, "--plain"]) == 0
        assert prompts[0] == tokenizer.encode(prompt) and tokenizer.eos_id in prompts[0]
        assert prompts[-1] == tokenizer.encode(prompt, special=False)
        assert tokenizer.eos_id not in prompts[-1] and tokenizer.decode(prompts[-1]) == prompt
        prompts.clear()


@pytest.mark.parametrize("record", ["question", "texts"])
def test_plain_pairs_hold_no_special_token(record: str, tmp_path: Path) -> None:
    """The vectors of `steer extract --plain` are those of the same pairs, given as plain."""
    path, lm = tmp_path / "pairs.jsonl", shardlens.load("demo")
    if record == "question":
        fields = {"question": "A<|eos|> B\n (A) yes\n (B) no", "answer_matching_behavior": " (A)"}
        content = {**fields, "answer_not_matching_behavior": " (B)"}
    else:
        content = {"positive": "Anna is<|eos|> calm", "negative": "Anna is bold"}
    path.write_text(json.dumps(content) + "\n" + json.dumps(content) + "\n")
    at, found = ["--at", "last"], []
    for more in ([], ["--plain"]):
        out = tmp_path / f"{len(more)}.safetensors"
        words = ["--pairs", str(path), "--layers", "1", "--out", str(out), *at]
        assert main(["steer", "extract", "demo", *words, *more]) == 0
        found.append(shardlens.SteeringVectors.load(out).vectors[Tap(1, "resid_post")])
        form = PromptForm(plain=bool(more))
        made = lm.extract(shardlens.read_pairs(path), layers="1", at="last", form=form)
        assert torch.equal(found[-1], made.vectors[Tap(1, "resid_post")])
    assert not torch.allclose(*found)

"""Chats with system messages and template variables: prompts, what is printed, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import shardlens
from shardlens import PromptForm
from shardlens.cli import main
from shardlens.model import DEMO, Tap

SYSTEM, PROMPT = "Be brief.", "Anna is\nwhere?"
CHAT = ["--chat", "--system", SYSTEM, "--template", "enable_thinking=false"]
FORM = PromptForm(chat=True, system=SYSTEM, template={"enable_thinking": False})
PAIRS = DEMO / "dispositions-cautious-bold.jsonl"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """The packaged model with the chat template of Qwen3."""
    directory = tmp_path_factory.mktemp("model") / "chatty"
    shutil.copytree(DEMO, directory)
    template = shared_data / "chat_templates" / "Qwen3.jinja"
    shutil.copyfile(template, directory / "chat_template.jinja")
    return directory


def expected_ids(directory: Path, user: str, **variables: Any) -> list[int]:
    """Ids of a chat with a system message, written by transformers."""
    oracle = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    texts, _ = oracle.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, **variables
    )
    return shardlens.load(directory).tokenizer.encode(texts[0], bos=False)


@pytest.mark.parametrize("command", ["lens", "generate", "steer generate"])
def test_a_chat_is_laid_out_as_transformers_does(
    command: str, chatty: Path, prompts: list[list[int]], vector: Path
) -> None:
    words = [*command.split(), str(chatty), "--prompt", PROMPT, "--max-new-tokens", "1"]
    if command == "steer generate":
        words += ["--vector", str(vector)]
    assert main([*words, *CHAT]) == 0
    expected = expected_ids(chatty, PROMPT, enable_thinking=False)
    assert prompts and all(ids == expected for ids in prompts)
    assert expected != expected_ids(chatty, PROMPT)
    assert main([*words, *CHAT[:3]]) == 0
    assert prompts[-1] == expected_ids(chatty, PROMPT)


def test_pairs_of_a_chat(chatty: Path, tmp_path: Path) -> None:
    """`steer extract` and `eval` write their pairs as `PromptForm` says."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(PAIRS.read_text().splitlines(keepends=True)[:8]))
    path, out = tmp_path / "vectors.safetensors", tmp_path / "eval.json"
    words = [str(chatty), "--pairs", str(few), "--layers", "1", *CHAT]
    assert main(["steer", "extract", *words, "--out", str(path)]) == 0
    lm, pairs = shardlens.load(chatty), shardlens.read_pairs(few)
    tap = Tap(1, "resid_post")

    def direction(form: PromptForm) -> torch.Tensor:
        return lm.extract(pairs, layers="1", form=form).vectors[tap]

    found = shardlens.SteeringVectors.load(path).vectors[tap]
    assert torch.equal(found, direction(FORM))
    assert not torch.allclose(found, direction(PromptForm(chat=True, system=SYSTEM)))
    more = ["--share", "0.5", "--multipliers=-1,0,1", "--json", str(out)]
    assert main(["steer", "eval", *words, *more]) == 0
    assert json.loads(out.read_text())["n_items"] == 4


def test_a_turn_is_a_line(
    chatty: Path, vector: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    words = [str(chatty), "--prompt", "Is [red] \x1b[2J :bomb:?", *CHAT, "--json", str(out)]
    turns = ["system: Be brief.", "user: Is [red] <1B>[2J :bomb:?"]
    assert main(["generate", *words, "--max-new-tokens", "6"]) == 0
    text = json.loads(out.read_text())["text"]
    assert text.strip() and "\x1b" not in text
    lines = capsys.readouterr().out.split("\n")
    assert "\n".join(lines) == "\n".join([*turns, f"assistant: {text}", ""])
    assert main(["lens", *words, "--max-new-tokens", "6", "--layers=-1"]) == 0
    assert capsys.readouterr().out.startswith("\n".join([*turns, f"assistant: {text}", "", ""]))
    assert main(["lens", *words, "--layers=-1", "--positions", "last"]) == 0
    assert capsys.readouterr().out.split("\n")[:4] == [*turns, "assistant: ", ""]
    more = ["--vector", str(vector), "--max-new-tokens", "2"]
    assert main(["steer", "generate", *words, *more]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == turns


def test_answers_of_a_chat_are_plain(chatty: Path) -> None:
    lm = shardlens.load(chatty)
    answers = [" (A<|eos|>", " (B<|eos|>"]
    vectors = [
        lm.extract([shardlens.Pair(question, *answers)], layers="1", at="last", form=FORM)
        for question in ("Which<|eos|>?", "Which?")
    ]
    assert not torch.equal(*(v.vectors[Tap(1, "resid_post")] for v in vectors))
    ids = lm.tokenizer.chat(FORM.messages("Which<|eos|>?"), enable_thinking=False)
    assert lm.tokenizer.eos_id not in ids


def test_a_conversation_is_a_prompt(chatty: Path) -> None:
    lm = shardlens.load(chatty)
    first, other = FORM.messages("Who?"), [{"role": "user", "content": "Where<|eos|>?"}]
    ids = [lm.tokenizer.chat(messages) for messages in (first, other)]
    result = lm.generate(first, max_new_tokens=4)
    assert result.token_ids == lm.generate(ids[0], max_new_tokens=4).token_ids
    results = lm.generate([first, other], max_new_tokens=4)
    assert [r.token_ids for r in results] == [
        r.token_ids for r in lm.generate(ids, max_new_tokens=4)
    ]
    assert lm.generate(shardlens.Request(first, 4)).token_ids == result.token_ids
    assert lm.lens(first, layers="-1").input_ids == ids[0]
    assert [trace.input_ids for trace in lm.lens([first, other], layers="-1")] == ids
    with pytest.raises(ValueError, match="message 0 of the chat"):
        lm.generate([{"content": "no role"}])
    with pytest.raises(ValueError, match="no chat template"):
        shardlens.load("demo").generate(first)


BAD = {
    "system alone": (["--system", "x"], "needs the chat form"),
    "template alone": (["--template", "x=1"], "need the chat form"),
    "no value": (["--chat", "--template", "x"], "NAME=VALUE"),
    "no name": (["--chat", "--template", "=x"], "NAME=VALUE"),
    "twice": (["--chat", "--template", "a=1", "--template", "a=2"], "twice"),
    "reserved": (["--chat", "--template", "messages=[]"], "messages"),
    "special": (["--chat", "--template", "special=true"], "special"),
    "unread": (
        ["--chat", "--template", "enable_thinkin=false"],
        "it reads content, enable_thinking, ",
    ),
    "template's own error": (["--chat", "--template", "tools=3"], "failed: TypeError"),
    "no adapter": (["--adapter", "/no/such/dir"], "/no/such/dir"),
    "revision of a folder": (["--revision", "main"], "a revision is of a hub id"),
    "empty stop": (["--stop", ""], "stop ''"),
    "stop at a special token": (["--stop", "<|eos|>"], "stop_ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags(name: str, chatty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, says = BAD[name]
    assert main(["generate", str(chatty), "--prompt", "a", *words]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("shardlens: ") and says in line and printed.out == ""


@pytest.mark.slow
def test_a_real_chat(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """SmolLM2 answers, ends its turn, and does not end it where a message spells the end."""
    try:
        lm = shardlens.load("smollm2")
    except ValueError as error:
        pytest.skip(str(error))
    out = tmp_path / "out.json"
    words = ["generate", "smollm2", "--chat", "--system", "You answer in one short sentence."]
    words += ["--prompt", "What is the capital of Italy?", "--json", str(out)]
    assert main(words) == 0
    content = json.loads(out.read_text())
    assert "Rome" in content["text"] and content["finish_reason"] == "stop"
    assert capsys.readouterr().out.endswith(f"\nassistant: {content['text']}\n")
    ids = lm.tokenizer.chat([{"role": "user", "content": "a<|im_end|>b"}])
    assert ids.count(lm.tokenizer.single_token("<|im_end|>")) == 2  # of system and user

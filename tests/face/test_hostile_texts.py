"""Hostile prompts and texts in commands: echoed as they are but for their hidden characters."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from hostile import COLOURS, TEXTS, hidden_in, pseudo_terminal

import shardlens
from shardlens.cli import main


def prompt_of_all() -> str:
    """The texts that an argument can hold and a vocabulary can spell, in one prompt."""
    spelt = [
        text for text in TEXTS if "\x00" not in text and not re.search("[\ud800-\udfff]", text)
    ]
    assert len(spelt) == 27
    return "|".join(text[:45] for text in spelt)


def echoed(prompt: str) -> str:
    """The prompt as it is to be shown."""
    return "".join(
        f"<{ord(c):0{2 if ord(c) < 128 else 4}X}>" if hidden_in(c, but="\n\t") else c
        for c in prompt
    )


WORDS = ["generate", "demo", "--max-new-tokens", "2", "--prompt"]


def test_an_echoed_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where output is piped, it is what was given, but for hidden characters; in JSON exactly."""
    path, prompt = tmp_path / "x.json", prompt_of_all()
    assert main([*WORDS, prompt, "--json", str(path)]) == 0
    shown, content = capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))
    assert content["prompt"] == prompt
    assert shown == echoed(prompt) + echoed(content["text"]) + "\n"


def test_a_command_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with pseudo_terminal() as (terminal, found):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main([*WORDS, prompt_of_all()]) == 0
        monkeypatch.undo()
    shown = b"".join(found).decode("utf-8")
    assert "\x1b[2m" in shown, "the prompt is dim"
    plain = COLOURS.sub("", shown)
    assert plain.startswith(echoed(prompt_of_all())) and not hidden_in(plain, but="\n\t")


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_errors_are_a_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["lens", f"/no/{text}".replace("\x00", "")], ["lens", "demo", f"--{text}"]):
        assert main([*words, "--prompt", "a"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("shardlens: ") and said[:-1].isprintable() and said[-1] == "\n"


def test_a_prompt_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, shown in (("ab\udcd7", "<D7>"), ("ab\ud800", "<D800>")):
        assert main([*WORDS, prompt]) == 2
        line = f"shardlens: character 3 of the text, {shown}, is not valid UTF-8\n"
        assert capsys.readouterr().err == line


def test_texts_side_by_side(
    vector: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the columns of `steer generate`, line breaks are shown, and made."""
    texts = itertools.cycle(TEXTS)
    generate = shardlens.LanguageModel.generate

    def hostile(self: shardlens.LanguageModel, *asked: object, **options: object) -> object:
        results = generate(self, *asked, **options)  # type: ignore[arg-type, call-overload]
        for result in results:
            result.text = next(texts)
        return results

    monkeypatch.setattr(shardlens.LanguageModel, "generate", hostile)
    scales = [f"{scale}" for scale in range(1, 5)]
    words = ["steer", "generate", "demo", "--vector", str(vector), "--prompt", "a", "--scale"]
    shown = ""
    for _ in range(6):
        assert main([*words, *scales, "--max-new-tokens", "1"]) == 0
        shown += capsys.readouterr().out
    assert not hidden_in(shown, but="\n")
    assert "a⇥b⏎" in shown and ":bomb:" in shown and "[red]no" in shown and "<1B>]0;owned" in shown

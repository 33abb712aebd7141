"""Where a generation ends: the tokenizer's end token, and texts across the cuts of tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch

import shardlens
from shardlens import LensSpec, Request, Sampling
from shardlens.cli import main
from shardlens.engine import Engine
from shardlens.engine import loop as loop_module
from shardlens.parallel import TensorParallel
from shardlens.stop_text import StoppedText, ends_at, text_of

PROMPT, N = "Anna is", 30
STOPS = [("rk on", 6), ("tea", 9), (".\nQ", 3), ("\n (", 13), ("ha", 1)]  # text, tokens until it


@pytest.fixture(scope="module")
def lm() -> shardlens.LanguageModel:
    return shardlens.load("demo", dtype=torch.float32)


@pytest.fixture(scope="module")
def whole(lm: shardlens.LanguageModel) -> shardlens.Result:
    """A text without any end."""
    result = lm.generate(PROMPT, max_new_tokens=N, stop_ids=())
    assert result.finish_reason == "length" and result.text is not None
    return result


def before(text: str, *stops: str) -> str:
    return text[: min([text.find(s) for s in stops if s in text], default=len(text))]


@pytest.mark.parametrize("stop", [stop for stop, _ in STOPS])
def test_a_text_ends_before_a_stop(
    stop: str, lm: shardlens.LanguageModel, whole: shardlens.Result
) -> None:
    assert whole.text is not None and stop in whole.text
    result = lm.generate(PROMPT, max_new_tokens=N, stop=stop)
    assert result.text == before(whole.text, stop) and result.finish_reason == "stop"
    n = len(result.token_ids)
    assert result.token_ids == whole.token_ids[:n] and n < N
    assert stop in text_of(lm.tokenizer, result.token_ids)
    assert stop not in text_of(lm.tokenizer, result.token_ids[:-1])


def test_several_stops_and_none_that_comes(
    lm: shardlens.LanguageModel, whole: shardlens.Result
) -> None:
    assert whole.text is not None
    both = lm.generate(PROMPT, max_new_tokens=N, stop=["tea", "rk on", "never"])
    assert both.text == before(whole.text, "tea", "rk on")
    assert lm.generate(PROMPT, max_new_tokens=N, stop=["never", "of "]) == whole
    requests = [Request(PROMPT, N, stop=stop) for stop, _ in STOPS]
    results = lm.generate([*requests, Request(PROMPT, N, stop_ids=()), *requests], max_batch=3)
    texts = [before(whole.text, stop) for stop, _ in STOPS]
    assert [result.text for result in results] == [*texts, whole.text, *texts]


@pytest.mark.parametrize("bad", ["", ["a", ""], [3], "<|eos|>"])
def test_bad_stops(bad: Any, lm: shardlens.LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"stop(\[0\])? "):
        lm.generate(PROMPT, stop=bad)


def test_the_engine_reads_no_text(lm: shardlens.LanguageModel) -> None:
    with pytest.raises(ValueError, match="give stop texts to a LanguageModel"):
        Engine(lm.model).run([Request([5], 3, stop="a")])
    ended = Engine(lm.model).run([Request([5], 9, ends=lambda tokens: len(tokens) == 4)])[0]
    assert len(ended.tokens) == 4 and ended.finish_reason == "stop"


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("mode", ["live", "deferred"])
def test_it_ends_as_by_a_stop_token(
    mode: Any, behind: int, lm: shardlens.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token and row for row, also where the host looks at records a step late."""
    init = loop_module.Loop.__init__

    def late(self: Any, *args: Any) -> None:
        init(self, *args)
        self.steps_behind = behind

    monkeypatch.setattr(loop_module.Loop, "__init__", late)
    lens = LensSpec(layers="1,-1", top_k=2, mode=mode)
    prompts = [PROMPT, "The capital of Norvia is", "Hugo", "A bear stands", "One day"]
    sampling = Sampling(0.7, seed=3)
    base = [Request(p, 24, sampling, lens=lens, stop_ids=()) for p in prompts]
    tokens = [result.token_ids for result in lm.generate(base, max_batch=2)]
    by_id, by_ends = [], []
    for number, request in enumerate(base):
        stop_id = tokens[number][3 + 4 * number]
        by_id.append(dataclasses.replace(request, stop_ids=[stop_id]))

        def ends(new: Sequence[int], stop_id: int = stop_id) -> bool:
            return new[-1] == stop_id

        by_ends.append(dataclasses.replace(request, ends=ends))
    expected, found = (lm.generate(asked, max_batch=2) for asked in (by_id, by_ends))
    for one_way, other in zip(expected, found, strict=True):
        assert one_way.finish_reason == other.finish_reason == "stop"
        assert one_way.token_ids == other.token_ids
        assert one_way.trace is not None and other.trace is not None
        assert torch.equal(one_way.trace.positions, other.trace.positions)
        assert torch.equal(one_way.trace.logprobs, other.trace.logprobs)


def test_ranks_end_alike(run_ranks: Any, whole: shardlens.Result) -> None:
    def body(parallel: TensorParallel) -> list[Any]:
        model = shardlens.load("demo", parallel=parallel, dtype=torch.float32)
        results = model.generate([Request(PROMPT, N, stop=s) for s, _ in STOPS], max_batch=2)
        return [(result.token_ids, result.text) for result in results]

    alone, *two = *run_ranks(1, body), *run_ranks(2, body)
    assert two == [alone, alone] and whole.text is not None
    assert [text for _, text in alone] == [before(whole.text, stop) for stop, _ in STOPS]


def test_the_end_token_of_the_tokenizer(
    lm: shardlens.LanguageModel, whole: shardlens.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends a text beside those of the config, unless the request names its stop tokens."""
    eos, n = whole.token_ids[7], whole.token_ids.index(whole.token_ids[7]) + 1
    monkeypatch.setattr(lm.tokenizer, "eos_id", eos)
    result = lm.generate(PROMPT, max_new_tokens=N)
    assert result.token_ids == whole.token_ids[:n] and result.finish_reason == "stop"
    assert lm.generate(PROMPT, max_new_tokens=N, stop_ids=()).token_ids == whole.token_ids
    config = dataclasses.replace(lm.model.config, eos_token_ids=(whole.token_ids[2],))
    monkeypatch.setattr(lm.model, "config", config)
    assert lm.generate(PROMPT, max_new_tokens=N).token_ids == whole.token_ids[:3]


def test_text_as_it_comes(lm: shardlens.LanguageModel) -> None:
    """Any cut into tokens gives the same text, and nothing shown is taken back."""
    tokenizer, drawn = lm.tokenizer, Random(0)
    for _ in range(300):
        text = "".join(drawn.choices("ab\n漢é", k=drawn.randrange(12)))
        pieces, rest = [], text
        while rest:
            cut = drawn.randrange(1, len(rest) + 1)
            pieces += tokenizer.encode(rest[:cut], bos=False)
            rest = rest[cut:]
        stops = ["".join(drawn.choices("ab\n漢é", k=drawn.randrange(1, 4))) for _ in range(2)]
        stopped, ends, shown = StoppedText(tokenizer, stops), ends_at(tokenizer, stops), ""
        for n, token in enumerate(pieces, 1):
            shown += stopped.push(token)
            assert before(text, *stops).startswith(shown)
            assert ends(pieces[:n]) == stopped.has_stopped
            if stopped.has_stopped:
                break
        assert shown + stopped.flush() == before(text, *stops)
        assert stopped.has_stopped == any(stop in text for stop in stops)


@pytest.mark.parametrize("command", [["generate"], ["lens", "--layers=-1"]])
def test_stop_on_the_command_line(
    command: list[str],
    whole: shardlens.Result,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Any,
) -> None:
    out = tmp_path / "out.json"
    words = [*command, "demo", "--dtype", "float32", "--prompt", PROMPT]
    words += ["--max-new-tokens", str(N)]
    assert main([*words, "--stop", r"\n (", "--stop", "never", "--json", str(out)]) == 0
    assert whole.text is not None
    text = before(whole.text, "\n (")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{PROMPT}{text}\n")
    assert json.loads(out.read_text())["text"] == text
    if command == ["generate"]:
        assert printed == f"{PROMPT}{text}\n"


def test_lens_ends_only_what_it_continues(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", "demo", "--prompt", PROMPT, "--stop", "x"]) == 2
    assert "--max-new-tokens" in capsys.readouterr().err

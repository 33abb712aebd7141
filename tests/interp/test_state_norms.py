"""Averages of states and of their norms leave the attention sink out, and warn of another one."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunRanks
from oracles import hf_model, save
from steered import load
from tolerances import EFFECT, EXTRACTED

import shardlens
from shardlens.cli import main
from shardlens.engine import Steering
from shardlens.interp import (
    Extraction,
    Pair,
    PairIds,
    PromptForm,
    encode_pairs,
    extract,
    extract_encoded,
)
from shardlens.model import DEMO, Tap
from shardlens.parallel import TensorParallel
from shardlens.tokenizer import Tokenizer

SINGLE = TensorParallel.single()
PAIRS = [
    Pair("", " Anna is near the cautious story and ground", " Ben is"),
    Pair("", " Ben and to the", " Clara is bold and cautious to the capital of the barn"),
    Pair("", " Anna wants", " Anna wants to look twice near the bold bear"),
]
SINK = 60.0  # times as long as other embeddings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The packaged one without its BOS."""
    directory = tmp_path_factory.mktemp("tokenizer")
    content = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.from_directory(directory)


def with_long(tokenizer: Tokenizer, words: str) -> Any:
    """A model in which some tokens' embeddings are SINK times as long as all others'."""
    torch.manual_seed(0)
    hf = hf_model("qwen3", vocab_size=1280)
    ids = [token for word in words.split() for token in tokenizer.encode(f" {word}", bos=False)]
    hf.model.embed_tokens.weight.data[ids] *= SINK
    return hf


@torch.no_grad()
def expected(hf: Any, tokenizer: Tokenizer, tap: Tap, first: int) -> tuple[torch.Tensor, float]:
    """The vector and the norm from float64 states at the positions from `first` on."""
    hf.double()
    assert tap.point == "resid_pre"
    gaps, norms = [], []
    for pair in PAIRS:
        sides = []
        for text in (pair.matching, pair.other):
            ids = torch.tensor([tokenizer.encode(text)])
            hidden = hf(ids, use_cache=False, output_hidden_states=True).hidden_states
            sides.append(hidden[tap.layer][0, first:])
        gaps.append(sides[0].mean(0) - sides[1].mean(0))
        norms += [side.norm(dim=-1).mean() for side in sides]
    return torch.stack(gaps).mean(0), float(torch.stack(norms).mean())


@pytest.mark.parametrize("size", [1, 2])
def test_a_sink_at_position_0_counts_nowhere(
    size: int, tokenizer: Tokenizer, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """Texts of unequal lengths; the sink would be most of their mean, and of its norm."""
    hf = with_long(tokenizer, "Anna Ben Clara")
    directory = save(hf, tmp_path)

    def body(parallel: TensorParallel) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return extract(
                load(directory, parallel), tokenizer, PAIRS, point="resid_pre", at="mean"
            )

    for found in run_ranks(size, body):
        for tap in found.taps:
            vector, norm = expected(hf, tokenizer, tap, first=1)
            scale = vector.abs().max()
            assert (found.at(tap) - vector).abs().max() <= EXTRACTED * scale
            assert found.resid_norm(tap) == pytest.approx(norm, rel=EXTRACTED)
            with_sink, sink_norm = expected(hf, tokenizer, tap, first=0)
            assert (with_sink - vector).abs().max() > EFFECT * EXTRACTED * scale
            assert sink_norm > norm * (1 + EFFECT * EXTRACTED)
            steering = Steering(found, [tap.layer], unit="resid_norm", scale=0.5)
            moved = steering.scale_at(tap) * found.norm(tap)
            assert moved == pytest.approx(0.5 * norm, rel=EXTRACTED)


@pytest.mark.parametrize("at", ["mean", "last"])
@pytest.mark.parametrize("text", [" Ben", ""])
def test_a_text_of_one_token(at: str, text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Nothing is left of it but position 0; with a BOS it is at position 1."""
    model = load(save(hf_model("qwen3", vocab_size=1280), tmp_path), SINGLE)
    if not text:
        encoded = encode_pairs(tokenizer, PAIRS, PromptForm(), needs_label=False)
        side = encoded[1].matching
        short = [encoded[0], _with_matching(encoded[1], side.ids[:1])]
        with pytest.raises(ValueError, match=r"^pair 2: nothing is to be read but position 0"):
            extract_encoded(model, short, Extraction(at=at))
        return
    pairs = [PAIRS[0], Pair("", " The bear", text)]
    with pytest.raises(ValueError) as caught:
        extract(model, tokenizer, pairs, at=at)
    assert str(caught.value).startswith('pair 2: the text " Ben" has nothing after position 0')
    extract(model, Tokenizer.from_directory(DEMO), pairs, at=at)


def _with_matching(pair: PairIds, ids: list[int]) -> PairIds:
    side = dataclasses.replace(pair.matching, ids=ids)
    return dataclasses.replace(pair, matching=side, n_shared=0)


def test_another_sink_is_warned_of(
    tokenizer: Tokenizer, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """Once, on rank 0, at its position and with its token; twice over in these pairs."""
    hf = with_long(tokenizer, "Anna Ben Clara story look")
    story, look = (tokenizer.encode(word, bos=False)[0] for word in (" story", " look"))
    weight = hf.model.embed_tokens.weight.data
    weight[story] *= 1.5 * weight[look].norm() / weight[story].norm()
    directory, at = save(hf, tmp_path), tokenizer.encode(PAIRS[0].matching).index(story)

    def body(parallel: TensorParallel) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            extract(load(directory, parallel), tokenizer, PAIRS, point="resid_pre", at="mean")
        return [str(warning.message) for warning in caught]

    (line,) = body(SINGLE)
    assert line.startswith(f"the state of resid_pre of layer 0 at position {at} ")
    assert (
        "(' story') of the matching text of pair 1 has " in line
        and ", and 1 other position likewise: " in line
    )
    assert 0.3 * SINK < float(line.split(" times ")[0].split()[-1]) < 3 * SINK
    (encoded,) = encode_pairs(tokenizer, PAIRS[:1], PromptForm(), needs_label=False)
    lines: list[str] = []
    extract_encoded(
        load(directory, SINGLE), [encoded], Extraction(at="last"), on_warning=lines.append
    )
    assert not lines  # of the last tokens' states, none stands out


def test_ranks_warn_once(tokenizer: Tokenizer, run_ranks: RunRanks, tmp_path: Path) -> None:
    directory = save(with_long(tokenizer, "story"), tmp_path)
    encoded = encode_pairs(tokenizer, PAIRS, PromptForm(), needs_label=False)

    def body(parallel: TensorParallel) -> int:
        lines: list[str] = []
        model, extraction = load(directory, parallel), Extraction("resid_pre", [0], at="mean")
        extract_encoded(model, encoded, extraction, on_warning=lines.append)
        return len(lines)

    assert run_ranks(2, body) == [1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [1, 2])
def test_states_that_are_not_finite(
    size: int, bad: float, tokenizer: Tokenizer, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """A weight in the last rank's memory alone, which at this tap reaches no other rank."""
    directory = save(hf_model("qwen3", vocab_size=1280), tmp_path)

    def body(parallel: TensorParallel) -> str:
        model = load(directory, parallel)
        if parallel.rank == parallel.size - 1:
            model.blocks[2].mlp_norm.weight.data[5] = bad
        with pytest.raises(ValueError) as caught:
            extract(model, tokenizer, PAIRS, point="mlp_norm", layers=[2], at="last")
        return str(caught.value)

    (line,) = set(run_ranks(size, body))
    assert line.startswith("the states of pair 1 at mlp_norm of layer 2 are not finite: ")
    assert (
        f"model.layers.2.post_attention_layernorm.weight holds NaN or infinity on rank {size - 1}"
    )


def test_states_beyond_float16(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """At the taps that are read; those before are none the worse."""
    model = load(save(hf_model("qwen3", vocab_size=1280), tmp_path), SINGLE).half()
    model.blocks[1].mlp.down.weight.data.mul_(1e4)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    extract(model, tokenizer, PAIRS, layers=[0], at="mean")
    with pytest.raises(ValueError, match=r"pair 1 at mlp_out of layer 1 .* bfloat16 or float32$"):
        extract(model, tokenizer, PAIRS, point="mlp_out", at="mean")


QUESTIONS = [Pair(f"{name} ran. (A) or (B)?", " (A)", " (B)") for name in ("Lily", "Tom", "Mom")]


def test_propensities_that_are_not_finite(tmp_path: Path) -> None:
    """By the edit, where the item itself is sound, else as anywhere; and edits out of bounds."""
    tokenizer = Tokenizer.from_directory(DEMO)
    directory = save(hf_model("llama-mha", vocab_size=1280), tmp_path)
    lm = shardlens.LanguageModel(load(directory, SINGLE).half(), tokenizer)
    vectors = shardlens.SteeringVectors(
        {Tap(layer, "mlp_out"): torch.randn(48) for layer in (0, 2)}, {}, n_layers=3
    )
    for protocol in ("paper", "steering-bench"):
        with pytest.raises(ValueError) as caught:
            lm.steerability(QUESTIONS, vectors, multipliers=(-1, 0, 2e5), protocol=protocol)
        assert str(caught.value).startswith(
            "the propensities of pair 1 are not finite under the edit at mlp_out of layer 0 of "
            "scale 200000, which moves states by "
        )
        assert str(caught.value).endswith(", or run the model in bfloat16 or float32")
    for multipliers, says in (
        ((0, 1e-300), "a slope needs at least two different multipliers"),
        ((0, -1e30), "^the edit at mlp_out of layer 0, multiplier 1e.30, can move states by "),
    ):
        with pytest.raises(ValueError, match=says):
            lm.steerability(QUESTIONS, vectors, multipliers=multipliers)
    lm.model.head.weight.data[tokenizer.encode("(A", bos=False)[-1], 0] = math.nan
    with pytest.raises(ValueError, match=r"not finite: lm_head\.weight holds NaN .* on rank 0: "):
        lm.steerability(QUESTIONS, vectors, multipliers=(-1, 0, 1))


def test_the_command_warns_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a line, with the hidden characters of the token shown."""
    directory, tokenizer = tmp_path / "model", Tokenizer.from_directory(DEMO)
    hf = hf_model("llama-mha", vocab_size=1280)
    hf.model.embed_tokens.weight.data[tokenizer.encode("\n", bos=False)] *= SINK
    save(hf, directory)
    capsys.readouterr()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((DEMO / name).read_bytes())
    texts = [{"positive": "Lily was\nhappy", "negative": "Tom sat and was red"}]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(text) + "\n" for text in texts))
    out = tmp_path / "v.safetensors"
    words = ["steer", "extract", str(directory), "--pairs", str(pairs), "--out", str(out)]
    assert main([*words, "--at", "mean", "--point", "resid_pre", "--layers", "0"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shardlens: warning: the state of resid_pre of layer 0 at position ")
    assert r"('\n') of the matching text of pair 1 has " in line
    assert out.exists()

"""A trained model that this project did not train, against transformers, as a user calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import PASSES

import shardlens
from shardlens.parallel import TensorParallel

PROMPT = "Once upon a time, there was a little girl named"


@pytest.fixture(scope="module")
def hf(stories: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_greedy_continuation_and_last_layer(
    ranks: int, stories: Path, hf: Any, run_ranks: Any
) -> None:
    def body(parallel: TensorParallel) -> shardlens.Result:
        lm = shardlens.load(stories, parallel=parallel)
        result = lm.generate(PROMPT, max_new_tokens=120, lens=shardlens.LensSpec())
        return result

    for result in run_ranks(ranks, body):
        trace = result.trace
        prompt = trace.input_ids[: -len(result.token_ids)]
        expected = hf.generate(torch.tensor([prompt]), max_new_tokens=120, do_sample=False)
        assert trace.input_ids == expected[0].tolist()
        with torch.no_grad():
            logprobs = hf(expected).logits[0].double().log_softmax(-1)
        expected_logprobs = logprobs[trace.positions].gather(-1, trace.token_ids[:, -1])
        assert (trace.logprobs[:, -1] - expected_logprobs).abs().max() <= PASSES
        assert torch.equal(trace.token_ids[:, -1, 0], logprobs[trace.positions].argmax(-1))


def test_a_prediction_forms(stories: Path) -> None:
    """At "…little girl named" the name Lily rises through the layers to 0.93 at the last."""
    lm = shardlens.load(stories)
    lily = lm.tokenizer.single_token("Lily")
    trace = lm.lens(PROMPT, targets=lily)
    probabilities = trace.target_logprob[-1].exp()
    assert trace.names[int(trace.token_ids[-1, -1, 0])].strip() == "Lily"
    assert abs(probabilities[-1] - 0.93) < 0.01
    assert trace.target_rank[-1].tolist()[-1] == 0 < trace.target_rank[-1, 0]
    assert (trace.logprobs.exp().sum(-1) < 1).all()


def test_results_of_a_batch_are_those_of_each_prompt(stories: Path) -> None:
    lm = shardlens.load(stories)
    prompts = ["Once", PROMPT, "The big red dog"]
    together = lm.generate(prompts, max_new_tokens=40)
    alone = [lm.generate(prompt, max_new_tokens=40) for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize(
    "options", [dict(), dict(top_k=40), dict(top_p=0.9), dict(top_k=30, top_p=0.8)]
)
def test_sampled_text_does_not_depend_on_the_rank_count(
    options: dict[str, Any], stories: Path, run_ranks: Any
) -> None:
    sampling = shardlens.Sampling(temperature=1.1, seed=4, **options)

    def body(parallel: TensorParallel) -> str | None:
        lm = shardlens.load(stories, parallel=parallel)
        result = lm.generate(PROMPT, max_new_tokens=60, sampling=sampling)
        return result.text

    texts = {text for ranks in (1, 2, 4) for text in run_ranks(ranks, body)}
    assert len(texts) == 1


def test_streaming_and_stopping(stories: Path) -> None:
    lm = shardlens.load(stories)
    seen: list[tuple[int, int]] = []
    stop = lm.tokenizer.encode(".", bos=False)[-1]
    result = lm.generate(
        PROMPT, max_new_tokens=50, stop_ids=[stop], on_token=lambda *new: seen.append(new)
    )
    assert [token for _, token in seen] == result.token_ids
    assert (
        result.finish_reason == "stop"
        and result.token_ids[-1] == stop
        and len(result.token_ids) < 50
    )
    assert result.text is not None and result.text.endswith(".")
    endless = lm.generate(PROMPT, max_new_tokens=5)
    assert endless.finish_reason == "length"


@pytest.mark.parametrize(
    "prompt, new, names",
    [
        ("", 1, None),
        ([], 1, "empty"),
        ([1, 512], 1, "512"),
        ([1] * 500, 20, "context of 512"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([1], -1, "-1"),
        ([], 0, "empty"),
    ],
)
def test_bad_prompts(prompt: Any, new: int, names: str | None, stories: Path) -> None:
    lm = shardlens.load(stories)
    if names is None:  # a tokenizer that adds BOS makes an empty text one token long
        assert isinstance(lm.generate(prompt, max_new_tokens=new), shardlens.Result)
        return
    with pytest.raises(ValueError, match=names):
        lm.generate(prompt, max_new_tokens=new)


def test_trace_files(stories: Path, tmp_path: Path) -> None:
    """Every format is written, whole, and JSON and Parquet hold the numbers."""
    from pyarrow import parquet

    lm = shardlens.load(stories)
    trace = lm.lens(PROMPT, points=("mlp_out", "resid_post"), top_k=3)
    for ending in ("json", "html", "png", "parquet"):
        trace.save(tmp_path / f"trace.{ending}")
    assert len(list(tmp_path.iterdir())) == 4, "nothing partial is left"
    import json

    again = shardlens.Trace.from_dict(json.loads((tmp_path / "trace.json").read_text()))
    assert again.taps == trace.taps and again.names == trace.names
    assert torch.equal(again.token_ids, trace.token_ids)
    assert torch.equal(again.logprobs, trace.logprobs)
    assert torch.equal(again.target_logprob.isnan(), trace.target_logprob.isnan())
    table = parquet.read_table(tmp_path / "trace.parquet").to_pydict()
    assert len(table["token"]) == trace.token_ids.numel()
    assert table["token_id"] == trace.token_ids.flatten().tolist()
    assert (
        table["layer"][:6] == [0] * 6 and table["point"][:6] == ["mlp_out"] * 3 + ["resid_post"] * 3
    )
    assert "·Lily" in (tmp_path / "trace.html").read_text()
    assert (tmp_path / "trace.png").read_bytes()[1:4] == b"PNG"
    long = lm.lens([1] + [5] * 400, layers="-1")
    long.save(tmp_path / "long.png")  # more positions than a picture has room to name
    assert (tmp_path / "long.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"trace\.csv: a trace is written as \.json"):
        trace.save(tmp_path / "trace.csv")
    assert not (tmp_path / "trace.csv").exists()

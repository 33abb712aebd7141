"""How far rank counts differ: hand-computed figures, and what is and is not compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import PASSES

from shardlens.bench import rank_agreement, report
from shardlens.bench.models import model_config, random_model
from shardlens.bench.processes import RANK_ERROR, on_ranks
from shardlens.bench.rank_agreement import NEW_TOKENS, PROMPTS, differences, read_prompts, traces_of
from shardlens.cli import main
from shardlens.interp import Trace
from shardlens.model import DEMO, Tap
from shardlens.parallel import TensorParallel

TAPS = (Tap(0, "resid_post"), Tap(1, "resid_post"))
TINY = [[5, 3], [7], [1, 2, 3, 4]]


def trace_of(input_ids: list[int], token_ids: list[Any], logprobs: list[Any]) -> Trace:
    """Positions of all but the last id, two layers, two candidates."""
    trace = Trace.empty(TAPS, 2)
    trace.input_ids = input_ids
    trace.positions = torch.arange(len(input_ids) - 1)
    trace.token_ids, trace.logprobs = torch.tensor(token_ids), torch.tensor(logprobs)
    return trace


def test_figures_by_hand() -> None:
    """Two texts of two new tokens: one the same, one that parts at its second new token."""
    reference = [
        trace_of(
            [9, 4, 5],
            [[[1, 2], [4, 6]], [[1, 2], [5, 6]]],
            [[[-1.0, -2.0], [-0.5, -3.0]], [[-1.0, -2.0], [-0.25, -4.0]]],
        ),
        trace_of(
            [9, 8, 7],
            [[[3, 2], [8, 6]], [[1, 2], [7, 5]]],
            [[[-1.0, -2.0], [-0.5, -3.0]], [[-1.0, -2.0], [-1.0, -1.125]]],
        ),
    ]
    other = [
        trace_of(
            [9, 4, 5],
            # ranks swapped in layer 0; 7 instead of 6 in the last layer
            [[[2, 1], [4, 6]], [[1, 2], [5, 7]]],
            [[[-1.5, -1.75], [-0.5, -3.0]], [[-1.0, -2.0], [-0.5, -4.0]]],
        ),
        trace_of(
            [9, 8, 5],
            # the last position chose the token that differs, and was fed the same ones
            [[[3, 2], [8, 6]], [[1, 2], [5, 7]]],
            [[[-1.0, -2.0], [-0.5, -3.0]], [[-1.0, -2.0], [-1.0, -2.0]]],
        ),
    ]
    found = differences(other, reference, [1, 1])
    assert found["texts"] == 2 and found["texts_that_differ"] == 1
    assert found["first_differing_tokens"] == [None, 1]
    assert found["compared_positions"] == 4
    # layer 1's first candidates: 4 (0), 5 (0.25), 8 (0), 7 (-1 against -2)
    assert found["output_top1_nats"] == {"mean": (0.25 + 1) / 4, "largest": 1.0}
    # beside those: 1 (0.75) and 2 (0.5) of the swapped, 5 as second (-1.125 against -1)
    assert found["lens_topk_nats"]["mean"] == pytest.approx((0.75 + 0.5 + 0.25 + 1 + 0.125) / 15)
    assert found["lens_topk_nats"]["largest"] == 1.0
    assert found["topk_left_share"] == 1 / 16  # 6, of the first text's last position
    assert found["lens_top1_differs_share"] == 2 / 8
    assert differences(reference, reference, [1, 1])["lens_topk_nats"]["largest"] == 0


def test_runs_with_nothing_in_common() -> None:
    a, b = (trace_of([9, 4], [[ids, ids]], [[[-1.0, -2.0]] * 2]) for ids in ([1, 2], [3, 4]))
    with pytest.raises(ValueError, match="no likeliest token in common"):
        differences([a], [b], [1])


def test_texts_are_compared_until_they_part() -> None:
    """At the position that was fed another token nothing counts, at the one before all does."""
    same = [[[1, 2], [1, 2]]] * 5
    reference = trace_of([9, 9, 4, 5, 6, 7], same, [[[-1.0, -2.0]] * 2] * 5)
    gaps = [0.0, 0.0, 0.125, 8.0, 8.0]
    moved = trace_of([9, 9, 4, 0, 6, 7], same, [[[-1.0, -2.0], [-1.0 - gap, -2.0]] for gap in gaps])
    found = differences([moved], [reference], [2])
    assert found["first_differing_tokens"] == [1] and found["compared_positions"] == 3
    assert found["output_top1_nats"] == {"mean": 0.125 / 3, "largest": 0.125}


def on(run_ranks: Any, size: int, dtype: torch.dtype, change: float = 0.0) -> list[Trace]:
    def body(parallel: TensorParallel) -> list[Trace]:
        model = random_model(model_config("cpu-small"), parallel, dtype, torch.device("cpu"))
        model.blocks[1].mlp_norm.weight += change
        return traces_of(model, TINY)

    traces: list[Trace] = run_ranks(size, body)[0]
    return traces


def compared(traces: list[Trace], reference: list[Trace]) -> dict[str, Any]:
    return differences(traces, reference, [len(prompt) for prompt in TINY])


def test_float32_agrees_and_a_planted_difference_is_seen(run_ranks: Any) -> None:
    alone = on(run_ranks, 1, torch.float32)
    assert [len(trace.input_ids) for trace in alone] == [len(p) + NEW_TOKENS for p in TINY]
    fed = sum(len(p) + NEW_TOKENS - 1 for p in TINY)
    for size in (2, 4):
        found = compared(on(run_ranks, size, torch.float32), alone)
        assert found["texts_that_differ"] == 0 and found["compared_positions"] == fed
        assert found["lens_topk_nats"]["largest"] <= PASSES
    planted = compared(on(run_ranks, 2, torch.float32, change=0.1), alone)
    assert planted["lens_topk_nats"]["largest"] >= 10 * PASSES
    assert planted["lens_topk_nats"]["mean"] > 100 * found["lens_topk_nats"]["mean"]


def test_bfloat16_differs_as_it_does_from_float32(run_ranks: Any) -> None:
    """Rank counts are as far apart as one rank is from float32, within a factor of 3."""
    alone = on(run_ranks, 1, torch.bfloat16)
    mean = compared(on(run_ranks, 2, torch.bfloat16), alone)["lens_topk_nats"]["mean"]
    rounding = compared(alone, on(run_ranks, 1, torch.float32))["lens_topk_nats"]["mean"]
    assert rounding / 3 < mean < 3 * rounding


def test_prompts(tmp_path: Path) -> None:
    """Texts through the model's tokenizer, ids without it."""
    file = tmp_path / "prompts.json"
    assert len(read_prompts(None, DEMO)) == len(PROMPTS) == 8
    file.write_text('[[4, 5], "Anna is"]')
    ids, text = read_prompts(file, DEMO)
    assert ids == [4, 5] and text == read_prompts(None, DEMO)[PROMPTS.index("Anna is")]
    file.write_text("[[4, 5]]")
    assert read_prompts(file, tmp_path / "no tokenizer") == [[4, 5]]
    for content in ('{"a": 1}', "[[1.5]]", "[[true]]", '[["a"]]', "[3]"):
        file.write_text(content)
        with pytest.raises(ValueError, match="is no JSON list of texts or of lists of token ids"):
            read_prompts(file, DEMO)
    file.write_text("[")
    with pytest.raises(ValueError, match=r"prompts.json cannot be read"):
        read_prompts(file, DEMO)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ranks", "1"], "names one rank count"),
        (["--ranks", "2,2"], "names one rank count"),
        (["--ranks", "1,two"], "--ranks 1,two cannot be read: write e.g. 1,2,4"),
        (["--ranks", "1,0"], "--ranks 1,0 cannot be read"),
        (["--model", "/no/such/dir"], "/no/such/dir"),
        (["--prompts", "IDS"], "prompt 1 holds token id 1280, outside the vocabulary of 1280"),
        (["--prompts", "NONE"], "there is no prompt"),
        (["--save", "a/b"], "--save a/b"),
    ],
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before any process is started."""
    files = {"IDS": "[[1], [1280]]", "NONE": "[]"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    words = [str(tmp_path / word) if word in files else word for word in words]
    assert main(["bench", "ranks", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_as_a_command(
    run_ranks: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ranks as threads: the first of --ranks is compared to; bfloat16 with float32, too."""

    def measured(ranks: int, directory: Path, file: Path | None) -> dict[str, list[Trace]]:
        assert directory == DEMO and file == prompts

        def body(parallel: TensorParallel) -> Any:
            return rank_agreement.rank_run(directory, file, parallel)

        run = run_ranks(ranks, body)[0]
        return {name: [Trace.from_dict(trace) for trace in traces] for name, traces in run.items()}

    prompts = tmp_path / "prompts.json"
    prompts.write_text('["Anna is", [4, 5, 6]]')
    monkeypatch.setattr(rank_agreement, "_measured", measured)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    words = ["bench", "ranks", "--ranks", "2,1", "--prompts", str(prompts), "--save", "tiny"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "tiny.json").read_text())
    assert saved == json.loads(printed.splitlines()[-1])
    assert saved["benchmark"] == "rank_agreement" and saved["model"] == "demo"
    assert saved["environment"]["torch"] == torch.__version__
    assert saved["environment"]["threads"] == 1
    rows = {(row["dtype"], row["ranks"], *row["against"].values()): row for row in saved["rows"]}
    assert list(rows) == [
        ("float32", 1, "float32", 2),
        ("bfloat16", 1, "bfloat16", 2),
        ("bfloat16", 2, "float32", 2),
    ]
    assert rows["float32", 1, "float32", 2]["texts_that_differ"] == 0
    assert "float32 1 / float32 2" in printed and "0 of 2" in printed


def test_the_error_of_a_rank_is_named() -> None:
    log = """Traceback (most recent call last):
[rank1]:   raise ValueError(
[rank1]: ValueError: 3 ranks cannot share 8 attention heads
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
    found = RANK_ERROR.search(log)
    assert found is not None and found[1] == "ValueError: 3 ranks cannot share 8 attention heads"
    found = RANK_ERROR.search("KeyError: 'x'\n" + log)
    assert found is not None and found[1] == "KeyError: 'x'"


@pytest.mark.slow
def test_processes() -> None:
    """Real ranks give what ranks as threads give; a rank's error comes back as one line."""
    result = rank_agreement.rank_agreement("demo", [1, 2])
    assert result["rows"][0]["texts_that_differ"] == 0
    assert result["rows"][0]["lens_topk_nats"]["largest"] < PASSES
    assert result["rows"][1]["lens_topk_nats"]["largest"] > 10 * PASSES
    with pytest.raises(ValueError, match=r"^2 ranks failed: ValueError: shape none: there are"):
        on_ranks(2, "shardlens.bench.scaling", ["--shape", "none"], 1)

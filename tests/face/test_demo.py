"""The packaged model: what a stranger meets first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from steered import edit_table
from tolerances import LENS, LOGITS_RELATIVE

import shardlens
from shardlens.bench.compiled import CHIPS
from shardlens.engine import Steering
from shardlens.kernels.head_cut import cut, extra_bytes
from shardlens.model import DEMO, RowTaps, Tap
from shardlens.parallel import TensorParallel

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The capital of Norvia is"
# Shared memory that a block may ask for, by compute capability (CUDA C++ Programming Guide)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
QUESTIONS = sorted(DEMO.glob("dispositions-*.jsonl"))


@pytest.fixture(scope="module")
def demo() -> tuple[shardlens.Transformer, shardlens.Tokenizer]:
    lm = shardlens.load("demo", dtype=torch.float32)
    return lm.model, lm.tokenizer


def test_it_is_small_and_deep_enough(demo: tuple[Any, Any]) -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 8_000_000
    assert 6 <= demo[0].config.n_layers <= 12
    assert demo[0].config.dtype == torch.bfloat16


def test_transformers_agrees(demo: tuple[Any, Any]) -> None:
    """transformers loads the same directory: same ids, logits and greedy text."""
    import transformers

    model, tokenizer = demo
    hf = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer.encode(PROMPT)
    assert ids == hf_tokenizer(PROMPT).input_ids and ids[0] == tokenizer.bos_id
    with torch.no_grad():
        ours = model.norm(model(torch.tensor([ids]))) @ model.head.weight.T
        theirs = hf(torch.tensor([ids])).logits
    assert (ours - theirs).abs().max() / theirs.abs().max() <= LOGITS_RELATIVE
    expected = hf.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0].tolist()
    result = shardlens.LanguageModel(model).generate(ids, max_new_tokens=40)
    assert [*ids, *result.token_ids] == expected
    assert tokenizer.decode(expected) == hf_tokenizer.decode(expected, skip_special_tokens=True)


def test_a_prediction_forms_in_the_middle(demo: tuple[Any, Any], run_ranks: Any) -> None:
    """The right word is unlikely after the first block and likely at the end, on 1 and 2 ranks."""

    def body(parallel: TensorParallel) -> torch.Tensor:
        lm = shardlens.load("demo", parallel=parallel, dtype=torch.float32)
        target = lm.tokenizer.single_token(" Tesk")
        return lm.lens(PROMPT, targets=target, positions="last").target_logprob[0]

    alone, *two = *run_ranks(1, body), *run_ranks(2, body)
    assert alone[0].exp() < 0.2 < 0.8 < alone[-1].exp()
    assert all((logprob - alone).abs().max() <= 10 * LENS for logprob in two)


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_questions(path: Path, demo: tuple[Any, Any]) -> None:
    """Held-out questions: the three fields, balanced letters, and answers that keep their token."""
    tokenizer = demo[1]
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(items) >= 100 and len({item["question"] for item in items}) == len(items)
    letters = []
    for item in items:
        assert set(item) == {"question", "answer_matching_behavior", "answer_not_matching_behavior"}
        answers = [item["answer_matching_behavior"], item["answer_not_matching_behavior"]]
        letters.append(answers[0].strip(" ()"))
        assert sorted(answer.strip(" ()") for answer in answers) == ["A", "B"]
        asked = tokenizer.encode(item["question"] + "\nAnswer:")
        for answer in answers:
            whole = tokenizer.encode(item["question"] + "\nAnswer:" + answer)
            assert whole[: len(asked)] == asked, "the answer must not change the question's tokens"
    assert abs(letters.count("A") - len(letters) / 2) <= 0.1 * len(letters)


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_a_disposition_is_a_direction(path: Path, demo: tuple[Any, Any]) -> None:
    """The change that stating the pole makes before a letter flips the letters of other questions.

    The vector is the mean difference at the last token of block 2, "… is cautious" against
    "… is bold"; added once and taken away once on questions without a statement, it must move the
    letter as told, and more than random vectors of its norm.
    """
    model, tokenizer = demo
    first, second = path.stem.removeprefix("dispositions-").split("-")
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tap = Tap(2, "resid_post")
    a, b = (tokenizer.encode(letter, bos=False)[0] for letter in "AB")

    def ids_of(text: str) -> torch.Tensor:
        return torch.tensor([tokenizer.encode(f"{text}\nAnswer: (")])

    @torch.no_grad()
    def state(text: str) -> torch.Tensor:
        ids = ids_of(text)
        last = torch.tensor([ids.shape[1] - 1])
        capture = RowTaps((tap,), last, model.config.d, dtype=model.dtype)
        model(ids, sink=capture)
        return capture.states[0, 0]

    @torch.no_grad()
    def preference(item: dict[str, str], vector: torch.Tensor) -> float:
        ids = ids_of(item["question"])
        edit = Steering(vector, layers=[tap.layer], point=tap.point, positions="last_prompt")
        length = ids.shape[1]
        edits = edit_table([([edit], length)], length, model).at
        hidden = model(ids, edits=edits)[0, -1]
        logits = model.norm(hidden) @ model.head.weight.T
        sign = 1 if "A" in item["answer_matching_behavior"] else -1
        return sign * float(logits[a] - logits[b])

    stated = [f"{{}} is {{}}.\n{item['question']}" for item in items[:30]]
    contrast = [state(q.format("Anna", first)) - state(q.format("Anna", second)) for q in stated]
    vector = torch.stack(contrast).mean(0)
    noise = torch.nn.functional.normalize(torch.randn(10, model.config.d), dim=-1)

    def moves(v: torch.Tensor) -> torch.Tensor:
        return torch.tensor([preference(x, v) - preference(x, -v) for x in items[30:60]])

    assert (moves(vector) > 0).float().mean() >= 0.9
    random = torch.stack([moves(v * vector.norm()).mean().abs() for v in noise])
    assert moves(vector).mean() > 4 * random.mean()


def test_there_are_four_dispositions() -> None:
    assert len(QUESTIONS) >= 4


def test_readme_says_what_was_measured() -> None:
    """Each figure of the README against the file that it names."""
    readme = (ROOT / "README.md").read_text()
    learnt = json.loads((ROOT / "bench/results/demo.json").read_text())
    accuracies = ("held_out_facts", "held_out_two_step_facts", "recall_in_stories")
    figures = [learnt[name] for name in ("held_out_loss", *accuracies)]
    assert f"{learnt['minutes']} minutes" in readme and f"{learnt['parameters']:,}" in readme
    for name, measured in learnt["dispositions"].items():
        assert name in readme
        figures += [measured[kind]["accuracy"] for kind in measured]
    for value in figures:
        assert f"{value:.3f}" in readme
    memory = json.loads((ROOT / "bench/results/lens-memory.json").read_text())
    assert f"{100 * memory['peak_share_of_full_logits']:.1f}% of the memory" in readme
    assert f"sent {memory['lens_bytes_sent_per_row_and_rank']:.0f} bytes per row" in readme
    head = json.loads((ROOT / "bench/results/head-cpu.json").read_text())
    for row in head["results"]:
        ours, full = (row["peak_bytes"][way] / 2**20 for way in ("streamed", "full"))
        shape = f"{row['dtype']}, {row['vocab']:,}"
        assert f"| {shape} | {row['time_ratio']:.2f} | {ours:.1f} | {full:.1f} |" in readme
    built = json.loads((ROOT / "bench/results/compiled.json").read_text())["kernels"]
    assert {kernel["capability"] for kernel in built} == set(SHARED_KIB)
    assert all(f"sm_{capability}" in readme for capability in SHARED_KIB)
    assert not any(kernel["spills"] for kernel in built) and "spills no registers" in readme
    for kernel in built:
        assert kernel["shared_bytes"] <= 1024 * SHARED_KIB[kernel["capability"]]


def test_readme_says_what_the_head_takes_on_a_gpu() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())

    def sizes(rows: int) -> tuple[int, int]:
        """Bytes that an H100 allocates, and bytes of logits."""
        work = cut(rows, 128_256, 1, 5, torch.bfloat16, CHIPS[90], bulk=True)
        taken = extra_bytes(rows, work.shares, work.programs, 5, work.configs[0])
        return taken, 2 * rows * 128_256

    for rows in (1, 64):
        ours, logits = (f"{size / 1e6:.1f} MB" for size in sizes(rows))
        named = f"{rows} row" + "s" * (rows > 1)
        assert re.search(rf"{ours} at {named}, where (logits|they) take {logits}", readme)
    head_bytes, logits_bytes = sizes(4096)
    assert f"{head_bytes / 1e6:.1f} MB at 4,096 rows, {head_bytes / logits_bytes:.2%} of" in readme


def test_readme_says_how_far_rank_counts_differ() -> None:
    readme = (ROOT / "README.md").read_text()
    for file, name in (
        ("rank-agreement", "demo"),
        ("rank-agreement-extra-smollm2", "SmolLM2-135M"),
    ):
        assert f"bench/results/{file}.json" in readme
        result = json.loads((ROOT / f"bench/results/{file}.json").read_text())
        assert result["model"].startswith(name) and result["new_tokens"] == 32
        assert len(result["prompts"]) == 8 and result["top_k"] == 5
        largest = 0.0
        for row in result["rows"]:
            if row["dtype"] == "float32":
                assert row["texts_that_differ"] == 0
                largest = max(largest, row["lens_topk_nats"]["largest"])
                continue
            by_ranks = row["against"] == {"dtype": "bfloat16", "ranks": 1}
            assert by_ranks or row["against"] == {"dtype": "float32", "ranks": 1}
            compared = f"{row['ranks']} ranks and 1" if by_ranks else "1 rank and its float32"
            output, lens = (
                f"{row[what]['mean']:.3f}, {row[what]['largest']:.2f}"
                for what in ("output_top1_nats", "lens_topk_nats")
            )
            assert (
                f"| {name} | {compared} | {row['texts_that_differ']} of {row['texts']} | "
                f"{output} | {lens} | {row['lens_top1_differs_share']:.1%} |"
            ) in readme
        if name == "demo":
            assert [row["ranks"] for row in result["rows"]] == [2, 4, 2, 4, 1]
            assert f"by more than {largest:.5f} nats" in readme


def test_readme_says_how_fast_generation_was() -> None:
    readme = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / "bench/results/cpu.json").read_text())
    assert len(result["runs"]) == 7 and result["shape"] == "cpu"
    assert result["environment"]["threads"] == 2
    for run in result["runs"].values():
        speed, first = f"{run['tokens_per_s']:.3g}", f"{run['first_token_ms']:,.0f}"
        assert f"| {speed} | {first} | {run['peak_bytes'] / 2**20:,.1f} |" in readme
    claims = {claim["claim"]: claim["figure"] for claim in result["claims"]}
    assert f"at {claims['speed with lens over without']:.2f} of its speed" in readme
    paper = claims["speed with lens over the paper's method"]
    assert f"{paper:.2f} times as fast" in readme
    assert f"{claims['speed with lens over the baseline']:.0f} times as fast" in readme
    long_run = json.loads((ROOT / "bench/results/long-run.json").read_text())
    for name, value in long_run.items():
        if name.endswith("_per_token"):
            assert f"{value:,.0f}" in readme
    assert long_run["tokens"] == 10_000


def test_readme_says_how_steerable_it_is() -> None:
    """The figures of four files, and that they say what the text claims."""
    readme = (ROOT / "README.md").read_text()
    for path in QUESTIONS:
        name = path.stem.removeprefix("dispositions-")
        result = json.loads((ROOT / f"bench/results/steer-{name}.json").read_text())
        rank, suggested = result["suggestion_rank"], result["suggested"]
        tap = next(
            tap
            for tap in result["taps"]
            if (tap["layer"], tap["point"]) == (suggested["layer"], suggested["point"])
        )
        slope, control = (
            f"{each['mean']:+.2f} ({each['low']:+.2f} to {each['high']:+.2f})"
            for each in (tap["slope"], tap["control_slope"])
        )
        ours = tap["slope"]
        assert (
            f"| {name} | {suggested['layer']} | {slope} | {ours['spearman']:+.2f} | "
            f"{ours['negative_share']:.0%} | {control} | {rank['rank']} of {rank['of']} |"
        ) in readme
        assert ours["low"] > max(0, tap["control_slope"]["high"])
        assert ours["spearman"] >= 0.9 and ours["negative_share"] < 0.15
        assert (result["n_items"], result["n_train"]) == (120, 80)
    by_label = json.loads((ROOT / "bench/results/steer-label-cautious-bold.json").read_text())
    largest = max(abs(tap["slope"]["mean"]) for tap in by_label["taps"])
    assert f"slopes of at most {largest:.2f}" in readme
    sweep = json.loads((ROOT / "bench/results/steer-sweep.json").read_text())
    assert all(claim["met"] for claim in sweep["claims"])
    assert f"{sweep['time_ratio']:.0f} times as fast for {sweep['variants']} variants" in readme

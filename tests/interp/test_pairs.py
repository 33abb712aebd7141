"""Files of pairs: the published ones as json reads them, a broken one by its line; and splits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardlens.interp import Pair, read_pairs, split_pairs
from shardlens.model import DEMO

EVALS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
GOOD = {
    "question": "Q?",
    "answer_matching_behavior": " (A)",
    "answer_not_matching_behavior": " (B)",
}
PLAIN = {"positive": "I love it", "negative": "I hate it"}
SIDES = {
    "positive": {"prompt": "Q?", "response": "(A)"},
    "negative": {"prompt": "Q?", "response": "(B)"},
    "steering_token_index": -2,
    "meta": None,
}


def write_lines(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_array(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def refusal_of(path: Path) -> str:
    """The refusal of a file, without its name; it is one line."""
    with pytest.raises(ValueError) as caught:
        read_pairs(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def evals_of(records: list[Any]) -> Iterator[tuple[str, ...]]:
    for record in records:
        yield tuple(v[0] if isinstance(v, list) else v for v in map(record.get, EVALS))


def texts_of(pairs: list[Pair]) -> list[tuple[str, ...]]:
    return [(pair.question, pair.matching, pair.other) for pair in pairs]


def test_every_published_line_is_read(shared_data: Path) -> None:
    files = sorted((shared_data / "steering" / "anthropic-evals").rglob("*.jsonl"))
    files += sorted(DEMO.glob("dispositions-*.jsonl"))
    assert len(files) == 10
    for file in files:
        records = [json.loads(line) for line in file.open(encoding="utf-8")]
        assert len(records) >= 200
        assert texts_of(read_pairs(file)) == list(evals_of(records))


def test_every_published_array_is_read(shared_data: Path) -> None:
    caa = shared_data / "steering" / "caa"
    files = sorted((*caa.rglob("generate_dataset.json"), *caa.rglob("test_dataset_ab.json")))
    assert len(files) == 14
    for file in files:
        records = json.loads(file.read_text(encoding="utf-8"))
        assert len(records) >= 50
        assert texts_of(read_pairs(file)) == list(evals_of(records))


def test_steering_bench_is_read(shared_data: Path) -> None:
    file = shared_data / "steering" / "steering-bench" / "risk-seeking.json"
    pairs, records = read_pairs(file), json.loads(file.read_text(encoding="utf-8"))
    assert len(pairs) == len(records) == 1000
    for pair, record in zip(pairs, records, strict=True):
        assert (pair.question, pair.matching) == tuple(record["positive"].values())
        assert (pair.questions[1], pair.other) == tuple(record["negative"].values())
        assert pair.other_question is None
    assert len({pair.key for pair in pairs}) == len(set(texts_of(pairs)))


@pytest.mark.parametrize("name", ["mmlu/mmlu.json", "truthfulqa/truthful_qa.json"])
def test_files_of_another_kind_are_refused(name: str, shared_data: Path) -> None:
    message = refusal_of(shared_data / "steering" / "caa" / "test" / name)
    assert message.startswith(", item 1: has neither question, ")
    assert message.endswith(
        "prompt, correct, incorrect, correct_full_text, incorrect_full_text, category"
    )


def test_questions_without_answers_are_refused(shared_data: Path) -> None:
    files = sorted(shared_data.rglob("test_dataset_open_ended.json"))
    assert len(files) == 7
    for file in files:
        assert refusal_of(file) == ', item 1: has no field "answer_matching_behavior"'


@pytest.mark.parametrize("write", [write_lines, write_array])
def test_kinds_are_recognised_by_content_and_may_be_mixed(write: Any, tmp_path: Path) -> None:
    listed = {field: [text] for field, text in GOOD.items()}
    other = {**SIDES, "negative": {"prompt": "R?", "response": "(A)"}}
    pairs = read_pairs(write(tmp_path / "any.name", GOOD, listed, SIDES, PLAIN, other))
    assert pairs == [
        Pair("Q?", " (A)", " (B)"),
        Pair("Q?", " (A)", " (B)"),
        Pair("Q?", "(A)", "(B)"),
        Pair("", "I love it", "I hate it"),
        Pair("Q?", "(A)", "(A)", other_question="R?"),
    ]


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    """Line separators inside a text, a byte order mark, blank lines and CRLF are all harmless."""
    record = json.dumps({**GOOD, "question": "one\u2028two\x85three"}, ensure_ascii=False)
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"\r\n{record}\r\n\r\n{record}".encode())
    assert [pair.question for pair in read_pairs(path)] == ["one\u2028two\x85three"] * 2


DEEP = "[" * 100_000
BAD_RECORDS = {
    "no answer": ({"question": "Q?", EVALS[2]: "(A)"}, f'has no field "{EVALS[1]}"'),
    "no question": ({EVALS[1]: "(B)", EVALS[2]: "(A)"}, 'has no field "question"'),
    "question too": ({"question": "Q?", **PLAIN}, f'has no field "{EVALS[1]}"'),
    "empty": ({**GOOD, "question": " \n"}, '"question" is empty'),
    "empty answer": ({**GOOD, EVALS[2]: ""}, f'"{EVALS[2]}" is empty'),
    "number": ({**GOOD, EVALS[1]: 3}, f'"{EVALS[1]}" is a number, not a text'),
    "null": ({**GOOD, EVALS[1]: None}, f'"{EVALS[1]}" is null, not a text'),
    "two": ({**GOOD, EVALS[1]: ["a", "b"]}, f'"{EVALS[1]}" is a list of 2, not a text'),
    "none": ({**GOOD, EVALS[1]: []}, f'"{EVALS[1]}" is a list of 0, not a text'),
    "wrapped number": ({**GOOD, EVALS[1]: [1]}, f'"{EVALS[1]}" is a number, not a text'),
    "equal": (
        {**GOOD, EVALS[2]: "(A) "},
        "both answers are the same; nothing can be learnt from such a pair",
    ),
    "surrogate": ({**GOOD, EVALS[2]: "\ud800"}, "a text holds U+D800, which is no character"),
    "one side": ({"positive": "x"}, 'has no field "negative"'),
    "no prompt": (
        {**SIDES, "positive": {"response": "(A)"}},
        'has no field "positive.prompt"',
    ),
    "empty response": (
        {**SIDES, "negative": {"prompt": "Q?", "response": " "}},
        '"negative.response" is empty',
    ),
    "half": (
        {**SIDES, "negative": "x"},
        'one of "positive" and "negative" is a text and one an object',
    ),
    "numbers": ({"positive": 1, "negative": 2}, '"positive" is a number, not a text'),
    "list": ([1, 2, 3], "holds a list of 3, not an object with the fields of a pair"),
    "other fields": (
        {"a\nb": 1},
        f"has neither {', '.join(EVALS)} nor positive, negative; its fields: a b",
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_refused_by_its_line(case: str, tmp_path: Path) -> None:
    record, reason = BAD_RECORDS[case]
    lines = write_lines(tmp_path / "bad.jsonl", GOOD, "", PLAIN, record, GOOD)
    assert refusal_of(lines) == f", line 4: {reason}"
    array = write_array(tmp_path / "bad.json", GOOD, PLAIN, record, GOOD)
    assert refusal_of(array) == f", item 3: {reason}"
    write_lines(lines, GOOD, "", PLAIN, GOOD)
    assert len(read_pairs(lines)) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            json.dumps(GOOD) + '\n{"question": ',
            ", line 2: broken JSON (Expecting value, column 14)",
        ),
        (
            json.dumps(GOOD) + f"\n{DEEP}",
            ", line 2: broken JSON (number too large or nesting too deep)",
        ),
        (
            json.dumps(GOOD) * 2,
            f", line 1: broken JSON (Extra data, column {len(json.dumps(GOOD)) + 1})",
        ),
        ('[\n{"question": "Q?"\n}', ", line 3: broken JSON (Expecting ',' delimiter, column 2)"),
        (DEEP, ": broken JSON (number too large or nesting too deep)"),
        ("", ": holds no pair; write one JSON object per line"),
        ("\n \n", ": holds no pair; write one JSON object per line"),
        (" []\n", ": holds no pair; write one JSON object per line"),
    ],
)
def test_a_broken_file_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(content, encoding="utf-8")
    assert refusal_of(path) == reason


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal_of(tmp_path / "none.json") == " does not exist; give a file of pairs"
    assert refusal_of(tmp_path) == " cannot be read: Is a directory"
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"positive": "caf\xe9"}')
    assert refusal_of(latin) == " is not UTF-8 at byte 17; save it in UTF-8"


def test_keys_tell_texts_apart_and_never_change() -> None:
    pair = Pair("Q?", " (A)", " (B)")
    assert pair.key == "1079bb178e37dc53"
    assert pair == Pair("Q?", " (A)", " (B)") and Pair("Q?", " (A)", " (B)", "Q?").key == pair.key
    others = [
        Pair("Q?", " (B)", " (A)"),
        Pair("Q? (A)", " (A)", " (B)"),
        Pair("Q?", "(A)", " (B)"),
        Pair("Q?", " (A)", " (B)", other_question="R?"),
        Pair("R?", " (A)", " (B)", other_question="Q?"),
    ]
    assert len({pair.key, *(other.key for other in others)}) == 6


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("Q?", "a", " \n"), "an answer is empty"),
        (("Q?", "a", " a "), "both answers are the same"),
        (("Q?", "a", "a", "Q?"), "both answers are the same"),
        (("", "a", "b", "Q?"), "only one side has a question"),
        (("Q?", "a", "b", ""), "only one side has a question"),
        (("\udfff", "a", "b"), r"U\+DFFF, which is no character"),
    ],
)
def test_a_pair_made_by_hand_is_checked(texts: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Pair(*texts)


def test_reading_pairs_needs_no_torch() -> None:
    program = "import sys, shardlens.interp.pairs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent)


def many_pairs() -> list[Pair]:
    stems = [f"Question {number}?" for number in range(40)]
    swapped = [(" (A) yes\n (B) no", "A", "B"), (" (A) no\n (B) yes", "B", "A")]
    return [
        Pair(f"{stem}\n{options}", f"({ours})", f"({theirs})")
        for options, ours, theirs in swapped
        for stem in stems
    ]


def test_a_split_keeps_a_question_on_one_side() -> None:
    pairs = many_pairs()
    train, test = split_pairs(pairs, 0.4, seed=3)
    assert len(train) == 32 and len(test) == 48
    assert {pair.key for pair in (*train, *test)} == {pair.key for pair in pairs}

    def stems(side: list[Pair]) -> set[str]:
        return {pair.question.split("\n")[0] for pair in side}

    assert not stems(train) & stems(test)
    # By text alone the two orders of a question are two questions, and most would be torn apart.
    assert len({pair.question for pair in pairs}) == 80


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    pairs = many_pairs()

    def keys(pairs: list[Pair], seed: int) -> frozenset[str]:
        return frozenset(pair.key for pair in split_pairs(pairs, 0.5, seed)[0])

    assert split_pairs(pairs, 0.5, 1) == split_pairs(pairs, 0.5, 1)
    assert keys(pairs, 1) == keys(pairs[::-1], 1)
    assert len({keys(pairs, seed) for seed in range(8)}) == 8
    train, _ = split_pairs(pairs, 0.5, 1)
    assert train != [pair for pair in pairs if pair in train], "it is shuffled"


def test_a_split_joins_pairs_by_way_of_others() -> None:
    chain = [Pair(f"Q{i}", "a", "b", other_question=f"Q{i + 1}") for i in range(0, 20, 2)]
    links = [Pair(f"Q{i + 1}", "c", "d", other_question=f"Q{i + 2}") for i in range(0, 20, 2)]
    alone = Pair("else", "a", "b")
    for seed in range(4):
        train, test = split_pairs([*chain, alone, *links], 0.5, seed)
        assert sorted((len(train), len(test))) == [1, 20]
    with pytest.raises(ValueError, match=r"^20 pairs with 1 different questions cannot be split"):
        split_pairs(chain + links, 0.5, 0)


def test_plain_texts_are_split_by_pair() -> None:
    pairs = [Pair("", f"I love {thing}", "I hate it") for thing in "abcdefghij"] * 2
    train, test = split_pairs(pairs, 0.3, seed=0)
    assert len(train) == 6 and len(test) == 14
    assert not {pair.key for pair in train} & {pair.key for pair in test}


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_shares_that_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="it is between 0 and 1"):
        split_pairs(many_pairs(), share, 0)


def test_a_split_is_never_empty() -> None:
    with pytest.raises(ValueError, match=r"^1 pairs with 1 different questions"):
        split_pairs([Pair("Q?", "a", "b")], 0.5, 0)
    with pytest.raises(ValueError, match=r"0\.01 to 0\.99; give more questions"):
        split_pairs(many_pairs(), 0.01, 0)

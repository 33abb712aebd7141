"""Prompts of pairs: where tokens, answers and labels stand, against the offsets of `tokenizers`."""

from __future__ import annotations

import itertools
import json
import shutil
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from shardlens.interp import (
    Pair,
    PairIds,
    PromptForm,
    balance,
    encode_pair,
    encode_pairs,
    label_of,
    read_pairs,
)
from shardlens.model import DEMO
from shardlens.tokenizer import Tokenizer

LLAMA2, LLAMA3 = "tokenizers/llama2", "tokenizers/llama3"
LLAMA31, QWEN3, STORIES = "tokenizers/llama3.1-hf", "tokenizers/qwen3-hf", "stories260K-hf"
HERE = "demo"
WITH_JSON = [LLAMA31, QWEN3, STORIES, HERE]
ALL = [*WITH_JSON, LLAMA2, LLAMA3]
PLAIN, CHAT = PromptForm(), PromptForm(chat=True)

TEXTS = [
    "Lily (A)  ran\t\n\n x",
    "",
    " ",
    " a",
    "  two",
    "\t tab",
    "Question?\n (A) x\n (B) y\nAnswer: (A)",
    "漢字 👩‍💻 né é हाँ",
    "a<|eot_id|>b<|im_end|> <think>c</think>",
    "<|begin_of_text|>twice",
    "\u0301a",
]
DECOMPOSED = "e\u0301te\u0301 x\u0301q\u0307\u0323 가 \u1112\u1161\u11ab.\u2126\u212b\u0344"

load = cache(Tokenizer.from_directory)


def path_of(directory: str, shared_data: Path) -> Path:
    return DEMO if directory == HERE else shared_data / directory


@cache
def oracle_of(directory: Path) -> tokenizers.Tokenizer:
    """The same tokenizer in `tokenizers`, set to leave the spaces in its offsets."""

    def untrimmed(value: Any) -> Any:
        if isinstance(value, list):
            return [untrimmed(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {k: False if k == "trim_offsets" else untrimmed(v) for k, v in value.items()}

    spec = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    return tokenizers.Tokenizer.from_str(json.dumps(untrimmed(spec)))


def label_text(tokenizer: Tokenizer, encoded: PairIds) -> tuple[str, str]:
    matching, other = encoded.label_ids
    return tokenizer.token_text(matching), tokenizer.token_text(other)


@pytest.mark.parametrize("directory", WITH_JSON)
@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_those_of_tokenizers(directory: str, text: str, shared_data: Path) -> None:
    tokenizer = load(path_of(directory, shared_data))
    expected = oracle_of(path_of(directory, shared_data)).encode(text)
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == expected.ids == tokenizer.encode(text)
    offsets = expected.offsets
    if directory == STORIES and text and tokenizer.token_text(ids[1]) == " ":
        # There the space put before a text counts as its first character.
        assert (spans[1], offsets[1]) == ((0, 0), (0, 1))
        del spans[1], offsets[1]
    assert spans == offsets


def spans_that_spell(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """The spans of a text, of which every token that is whole characters spells its own.

    The first one may have a space more, as the text of a sentencepiece model has.
    """
    ids, spans = tokenizer.encode_with_spans(text, bos=False)
    for index, (id, (start, end)) in enumerate(zip(ids, spans, strict=True)):
        token = tokenizer.token_bytes(id).decode("utf-8", errors="replace")
        if token != text[start:end] and "\ufffd" not in token:
            assert token == " " + text[start:end] and index == 0
    assert all(before <= after for before, after in itertools.pairwise(spans))
    covered = {at for start, end in spans for at in range(start, end)}
    assert covered == set(range(len(text)))
    return spans


@pytest.mark.parametrize("text", [*TEXTS, DECOMPOSED])
def test_spans_of_a_sentencepiece_model(text: str, shared_data: Path) -> None:
    tokenizer = load(shared_data / LLAMA2)
    spans = spans_that_spell(tokenizer, text)
    assert tokenizer.encode_with_spans(text).spans == [(0, 0), *spans]


@pytest.mark.parametrize("scheme", ["always", "first", "never", "prepend"])
def test_spans_wherever_a_space_is_put(scheme: str, shared_data: Path, tmp_path: Path) -> None:
    spec = json.loads((shared_data / STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    if scheme != "prepend":
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": scheme,
            "split": False,
        }
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    spec["added_tokens"].append({"id": 512, "content": "<|end|>", "special": True, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = Tokenizer.from_directory(tmp_path)
    for text in ("Lily  ran", " Lily", "  ", "Lily\n"):
        spans_that_spell(tokenizer, text)
    text = "Lily<|end|>ran<|end|> x"
    ids, spans = tokenizer.encode_with_spans(text, bos=False)
    assert [spans[at] for at, id in enumerate(ids) if id == 512] == [(4, 11), (14, 21)]
    assert "".join(text[start:end] for start, end in spans) == text
    spaces = [tokenizer.token_text(id)[:1] for id in ids].count(" ")
    assert spaces == {"always": 3, "first": 2, "never": 1, "prepend": 4}[scheme]


def test_spans_of_text_that_is_composed_first(shared_data: Path) -> None:
    """Spans speak of the text as it was given, although the ids are those of its NFC."""
    tokenizer = load(shared_data / QWEN3)
    ids, spans = tokenizer.encode_with_spans(DECOMPOSED)
    assert ids == tokenizer.encode(unicodedata.normalize("NFC", DECOMPOSED))
    assert tokenizer.decode(ids) != DECOMPOSED
    assert spans[:3] == [(0, 5), (5, 7), (7, 8)]
    spelt = {span: b"" for span in spans}
    for id, span in zip(ids, spans, strict=True):
        spelt[span] += tokenizer.token_bytes(id)
    # Tokens of one and the same stretch spell its composed characters together.
    for (start, end), data in spelt.items():
        assert data.decode() == unicodedata.normalize("NFC", DECOMPOSED[start:end])
    assert spans[-1][1] == len(DECOMPOSED)


def test_labels_in_a_text_that_the_tokenizer_changes(shared_data: Path, tmp_path: Path) -> None:
    """Without its json the stories' model drops spaces; spans are of the text as it was given."""
    shutil.copy(shared_data / STORIES / "tokenizer.model", tmp_path)
    tokenizer = load(tmp_path)
    for question in ("One two\n(A) x", "One  two", "  One \t  two  "):
        pair = Pair(question, "(A)", "(B)")
        assert label_text(tokenizer, encode_pair(tokenizer, pair, PLAIN)) == ("A", "B")


FORMS = {
    LLAMA2: ("A", " Yes", "A", " A"),
    LLAMA3: ("A", " Yes", "A", " A"),
    LLAMA31: ("A", " Yes", "A", " A"),
    QWEN3: ("A", " Yes", "A", " A"),
    STORIES: ("A", None, "A", "A"),
    HERE: ("A", None, "A", " A"),
}
CHAT_FORMS = ("(A", "Yes", "(A", "A")
CASES = [
    Pair("Sure?\n (A) yes\n (B) no", " (A)", " (B)"),
    Pair("Is the sky  blue?\tSay.", " Yes", " No"),
    Pair("Était-ce déjà 漢字 👩‍💻?\n(A):  Non\n(B):  Oui", "(A)", "(B)"),
    Pair("Pick one. A, or C", "A", "C"),
]


@pytest.mark.parametrize("directory", ALL)
@pytest.mark.parametrize("case", range(4))
def test_labels_as_each_tokenizer_cuts_them(directory: str, case: int, shared_data: Path) -> None:
    tokenizer, pair = load(path_of(directory, shared_data)), CASES[case]
    form = FORMS[directory][case]
    if form is None:
        with pytest.raises(ValueError, match=r'^the label "Yes" is 2 tokens'):
            encode_pair(tokenizer, pair, PLAIN)
        return
    encoded = encode_pair(tokenizer, pair, PLAIN)
    label, other = pair.matching.strip(" ()"), pair.other.strip(" ()")
    assert encoded.form == form == label_text(tokenizer, encoded)[0]
    assert label_text(tokenizer, encoded)[1] == form.replace(label, other)
    text = f"{pair.question}\nAnswer: {pair.matching.strip()}"
    assert encoded.matching.ids == tokenizer.encode(text)
    if directory in WITH_JSON:
        offsets = oracle_of(path_of(directory, shared_data)).encode(text).offsets
        start, end = offsets[encoded.matching.label_at]
        assert start <= text.rindex(label) < end and text[start:end] == form
        before, answered = offsets[encoded.matching.answer_at - 1 :][:2]
        assert before[1] <= text.rindex(pair.matching.strip()) < answered[1]
    assert encoded.matching.label_at == encoded.other.label_at == encoded.n_shared
    assert (encoded.key, encoded.is_first) == (pair.key, True)


@pytest.mark.parametrize("directory", [LLAMA31, QWEN3])
@pytest.mark.parametrize("case", range(4))
def test_labels_in_a_chat(directory: str, case: int, shared_data: Path) -> None:
    tokenizer, pair = load(shared_data / directory), CASES[case]
    encoded = encode_pair(tokenizer, pair, PromptForm(chat=True, system="Be brief."))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": pair.question},
    ]
    prompt = tokenizer.chat(messages)
    side = encoded.matching
    assert side.ids[: len(prompt)] == prompt and side.answer_at == len(prompt)
    assert side.label_at is not None and side.label_at >= side.answer_at
    assert encoded.form == CHAT_FORMS[case]
    # The answer's tokens are those of the whole text, although it was encoded by itself.
    text = tokenizer.decode(prompt, skip_special=False) + pair.matching.strip()
    whole = oracle_of(shared_data / directory).encode(text, add_special_tokens=False)
    assert side.ids == whole.ids
    start, end = whole.offsets[side.label_at]
    assert text[start:end] == encoded.form
    without = encode_pair(tokenizer, pair, CHAT)
    assert "Be brief." not in tokenizer.decode(without.matching.ids)
    assert without.form == encoded.form


@pytest.mark.parametrize("directory", ALL)
def test_labels_of_the_published_pairs(directory: str, shared_data: Path) -> None:
    tokenizer = load(path_of(directory, shared_data))
    steering = shared_data / "steering"
    files = [
        steering / "anthropic-evals/advanced-ai-risk/survival-instinct.jsonl",
        steering / "caa/generate/sycophancy/generate_dataset.json",
        steering / "steering-bench/risk-seeking.json",
        DEMO / "dispositions-cautious-bold.jsonl",
    ]
    forms = [PLAIN, CHAT] if tokenizer.has_chat_template else [PLAIN]
    for file, form in itertools.product(files, forms):
        pairs = read_pairs(file)[:20]
        for pair, encoded in zip(pairs, encode_pairs(tokenizer, pairs, form), strict=True):
            letters = [text.strip(" ()") for text in (pair.matching, pair.other)]
            assert [text.strip(" (") for text in label_text(tokenizer, encoded)] == letters
            shared = encoded.matching.ids[: encoded.n_shared]
            assert shared == encoded.other.ids[: encoded.n_shared]
            assert len(shared) == encoded.matching.label_at
            assert encoded.is_first == (letters[0] < letters[1])
        assert balance(encode_pairs(tokenizer, pairs, form)) is not None


def test_an_answer_that_goes_on_after_its_label(shared_data: Path) -> None:
    tokenizer = load(shared_data / LLAMA31)
    pair = Pair("Q?", "(B) because I said", "(A) of an apple")
    encoded = encode_pair(tokenizer, pair, PLAIN)
    assert label_text(tokenizer, encoded) == ("B", "A")
    assert encoded.is_first is False
    assert encoded.matching.label_at == encoded.matching.answer_at + 1
    assert encoded.n_shared == encoded.matching.label_at < len(encoded.matching.ids) - 4


@pytest.mark.parametrize(
    ("question", "prefix", "answer", "text"),
    [
        ("Q?", None, "(A)", "Q?\nAnswer: (A)"),
        ("Q?", None, " (A)", "Q?\nAnswer: (A)"),
        ("Q?", None, "\n(A)", "Q?\nAnswer:\n(A)"),
        ("Q?\nAnswer:", None, "(A)", "Q?\nAnswer: (A)"),
        ("Q?\n\nAnswer: ", None, " (A)", "Q?\n\nAnswer: (A)"),
        ("Q?", "\nAnswer: ", "(A)", "Q?\nAnswer: (A)"),
        ("Q?", "\nAnswer: ", " (A)", "Q?\nAnswer: (A)"),
        ("Q?", "\n", "(A)", "Q?\n(A)"),
        ("Q?", "", " (A)", "Q? (A)"),
        ("Answer: what?", None, "(A)", "Answer: what?\nAnswer: (A)"),
    ],
)
def test_one_border_however_it_is_written(
    question: str, prefix: str | None, answer: str, text: str, shared_data: Path
) -> None:
    """No trailing space: a prompt that ends in one is cut where no model was trained to."""
    form = PromptForm(answer_prefix=prefix)
    for directory in (LLAMA2, LLAMA31, STORIES):
        tokenizer = load(shared_data / directory)
        pair = Pair(question, answer, answer.replace("A", "B"))
        encoded = encode_pair(tokenizer, pair, form)
        assert encoded.matching.ids == tokenizer.encode(text)
        line_before = directory == LLAMA31 and "\n(" in text
        assert encoded.form == ("(A" if line_before else "A")


def test_the_label_is_never_the_space_before_it(shared_data: Path) -> None:
    """The stories' model keeps the space apart before most letters: both prompts then end alike."""
    tokenizer = load(shared_data / STORIES)
    encoded = encode_pair(tokenizer, Pair("Q?", "A", "C"), PLAIN)
    label_at = encoded.matching.label_at
    assert label_at is not None and label_at == encoded.matching.answer_at == encoded.n_shared
    assert tokenizer.token_text(encoded.matching.ids[label_at - 1]) == " "
    assert encoded.matching.ids[label_at - 1] == encoded.other.ids[label_at - 1]
    assert label_text(tokenizer, encoded) == ("A", "C")
    # Before a B it does not, so the two labels stand at different positions.
    with pytest.raises(ValueError, match=r'"A" and " B" do not follow the same tokens'):
        encode_pair(tokenizer, Pair("Q?", "A", "B"), PLAIN)


def test_tokens_across_the_border_are_those_of_the_whole_text(shared_data: Path) -> None:
    """ "\n" and the prefix's own line end are one token: cut apart they would be another text."""
    tokenizer = load(shared_data / LLAMA31)
    encoded = encode_pair(
        tokenizer, Pair("Q?", "\n\nYes", "\n\nNo"), PromptForm(answer_prefix="\nAnswer:")
    )
    assert encoded.matching.ids == tokenizer.encode("Q?\nAnswer:\n\nYes")
    apart = tokenizer.encode("Q?\nAnswer:") + tokenizer.encode("\n\nYes", bos=False)
    assert encoded.matching.ids != apart
    assert label_text(tokenizer, encoded) == ("Yes", "No")


REFUSALS = {
    'the label "Certainly" is 3 tokens (" C", "ertain", "ly"): choose pairs whose answers differ '
    "in one token": Pair("Q?", "Certainly", "No"),
    'both answers have the label "A": choose pairs whose answers begin with different words': Pair(
        "Q?", "(A) now", "(A) later"
    ),
    'the answer "(?)" has no letter or digit to identify it': Pair("Q?", "(?)", "(!)"),
    'the labels\' tokens "A" and " No" do not follow the same tokens: write both answers alike up '
    'to the label, as in "(A)" and "(B)"': Pair("Q?", "(A)", "No"),
    "plain texts have no label: read their last position or their mean": Pair("", "love", "hate"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_pairs_without_labels(message: str, shared_data: Path) -> None:
    tokenizer, pair = load(shared_data / LLAMA31), REFUSALS[message]
    if "Certainly" in message:
        assert len(tokenizer.encode(" Certainly", bos=False)) == 1, "it is one token there"
        tokenizer = load(shared_data / LLAMA2)
    with pytest.raises(ValueError) as caught:
        encode_pair(tokenizer, pair, PLAIN)
    assert str(caught.value) == message
    encoded = encode_pair(tokenizer, pair, PLAIN, needs_label=False)
    assert (encoded.form, encoded.is_first) == (None, None)
    assert encoded.matching.label_at is None and encoded.other.label_at is None
    with pytest.raises(ValueError, match="this pair has no labels"):
        _ = encoded.label_ids
    good = CASES[0]
    with pytest.raises(ValueError) as caught:
        encode_pairs(tokenizer, [good, good, pair], PLAIN)
    assert str(caught.value) == f"pair 3: {message}"
    assert len(encode_pairs(tokenizer, [good, pair], PLAIN, needs_label=False)) == 2


def test_a_label_of_one_character_but_several_tokens(shared_data: Path) -> None:
    """Each of its byte tokens spans the whole character, and still none of them is the label."""
    tokenizer = load(shared_data / STORIES)
    with pytest.raises(ValueError, match=r'^the label "漢" is 3 tokens '):
        encode_pair(tokenizer, Pair("Q?", "漢", "字"), PLAIN)
    tokenizer = load(shared_data / LLAMA2)
    assert encode_pair(tokenizer, Pair("Q?", "漢", "字"), PLAIN).form == "漢"


def test_a_decomposed_label(shared_data: Path) -> None:
    tokenizer = load(shared_data / QWEN3)
    encoded = encode_pair(tokenizer, Pair("Cafe\u0301?", "E\u0301", "O\u0302"), PLAIN)
    assert label_text(tokenizer, encoded) == (" É", " Ô")
    with pytest.raises(ValueError, match="is 2 tokens"):
        encode_pair(load(shared_data / LLAMA31), Pair("Q?", "E\u0301", "O\u0302"), PLAIN)


def test_plain_texts(shared_data: Path) -> None:
    pair = Pair("", "I love  this", "I hate  this")
    for directory, first in ((LLAMA31, 1), (QWEN3, 0), (LLAMA2, 1)):
        tokenizer = load(shared_data / directory)
        for form in (PLAIN, CHAT):
            encoded = encode_pair(tokenizer, pair, form, needs_label=False)
            assert encoded.matching.ids == tokenizer.encode("I love  this")
            assert encoded.other.ids == tokenizer.encode("I hate  this")
            assert encoded.matching.answer_at == encoded.other.answer_at == first
            assert encoded.n_shared == first + 1


def test_two_questions_may_be_of_any_length(shared_data: Path) -> None:
    tokenizer = load(shared_data / LLAMA31)
    pair = Pair("A long question, is it not?", "(A)", "(B)", other_question="Short?")
    encoded = encode_pair(tokenizer, pair, PLAIN)
    assert label_text(tokenizer, encoded) == ("A", "B")
    assert encoded.n_shared == 1 < encoded.other.label_at < encoded.matching.label_at


def test_sides_with_the_same_tokens_are_refused(shared_data: Path) -> None:
    pair = Pair("Q?", "é", "e\u0301")
    with pytest.raises(ValueError, match="both sides have the same tokens"):
        encode_pair(load(shared_data / QWEN3), pair, PLAIN, needs_label=False)
    assert encode_pair(load(shared_data / LLAMA31), pair, PLAIN, needs_label=False).form is None


def test_forms_that_do_not_fit(shared_data: Path) -> None:
    with pytest.raises(ValueError, match="a system message needs the chat form"):
        PromptForm(system="Be brief.")
    with pytest.raises(ValueError, match=r"^pair 1: this model has no chat template"):
        encode_pairs(load(shared_data / STORIES), CASES[:1], CHAT)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" (A)", "A"),
        (" Yes", "Yes"),
        ("(B) because", "B"),
        ("\n\t10. ten", "10"),
        ("«Été»", "Été"),
        ("e\u0301te\u0301 x", "e\u0301te\u0301"),
        ("हाँ, जी", "हाँ"),
        ("_a_", "a"),
        ("don't", "don"),
    ],
)
def test_the_label_of_an_answer(answer: str, label: str) -> None:
    start, end = label_of(answer)
    assert answer[start:end] == label


def test_balance_counts_the_first_options(shared_data: Path) -> None:
    tokenizer = load(shared_data / QWEN3)

    def share(*answers: str) -> float | None:
        pairs = [Pair("Q?", *answer.split("/")) for answer in answers]
        return balance(encode_pairs(tokenizer, pairs, PLAIN, needs_label=False))

    assert share("(A)/(B)", "(B)/(A)", "(B)/(A)", "(B)/(A)") == 0.25
    assert share("1/2", "Yes/No", "yes/no", "(B)/(C)") == 1
    assert share("2/1", "No/Yes", "(b)/(a)") == 0
    assert share("(A)/(B)", "red/blue", "(?)/(!)") == 1
    assert share("red/blue") is None
    assert balance([]) is None

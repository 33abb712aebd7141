"""The border between question and answer: what is put there, and what is left as it was given."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from shardlens.interp import Pair, PromptForm, encode_pair
from shardlens.tokenizer import Tokenizer

TOKENIZERS = ["tokenizers/llama2", "tokenizers/llama3.1-hf", "tokenizers/qwen3-hf"]

load = cache(Tokenizer.from_directory)


def assert_writes(tokenizer: Tokenizer, pair: Pair, form: PromptForm, text: str) -> None:
    """The ids are those of `text`, and the label's token is the one that holds its letter."""
    encoded = encode_pair(tokenizer, pair, form)
    ids, spans = tokenizer.encode_with_spans(text)
    assert encoded.matching.ids == ids, tokenizer.decode(encoded.matching.ids)
    assert encoded.matching.label_at is not None
    start, end = spans[encoded.matching.label_at]
    assert start <= text.rindex("A") < end
    assert encoded.other.ids == tokenizer.encode("B".join(text.rsplit("A", 1)))


@pytest.mark.parametrize(
    ("prefix", "answer", "text"),
    [
        ("\nAnswer: (", "A)", "Q?\nAnswer: (A)"),
        ("\nAnswer: (", " A)", "Q?\nAnswer: (A)"),
        ("\n答案\uff1a", "A", "Q?\n答案\uff1aA"),
        ("\n答案\uff1a", " A", "Q?\n答案\uff1a A"),
        ("\n答案\uff1a「", "A」", "Q?\n答案\uff1a「A」"),
        ("\n答案\uff1a\uff08", "A\uff09", "Q?\n答案\uff1a\uff08A\uff09"),
        ("\nRéponse : «", "A»", "Q?\nRéponse : «A»"),
        ("\nAntwort: „", "A“", "Q?\nAntwort: „A“"),
        ("\nAnswer: [", "A]", "Q?\nAnswer: [A]"),
        ("\nAnswer:", "A", "Q?\nAnswer:A"),
        ("\nAnswer:", "(A)", "Q?\nAnswer:(A)"),
        ("\nAnswer: ", "A", "Q?\nAnswer: A"),
        ("\nMy answer is", " A", "Q?\nMy answer is A"),
        ("\n", "A", "Q?\nA"),
        ("", "(A)", "Q?(A)"),
    ],
)
def test_a_given_prefix_is_taken_as_it_is(
    prefix: str, answer: str, text: str, shared_data: Path
) -> None:
    pair, form = Pair("Q?", answer, answer.replace("A", "B")), PromptForm(answer_prefix=prefix)
    for directory in TOKENIZERS:
        assert_writes(load(shared_data / directory), pair, form, text)


@pytest.mark.parametrize(
    ("question", "prefix", "answer", "text"),
    [
        ("Q?\nAnswer: (", None, "A)", "Q?\nAnswer: (A)"),
        ("Q?\nAnswer:(", None, "A)", "Q?\nAnswer:(A)"),
        ("Q?\nAnswer: ( \n", None, "A)", "Q?\nAnswer: ( \nA)"),
        ("Q?\nAnswer:\n\n", None, " (A)", "Q?\nAnswer:\n\n(A)"),
        ("Q?\nAnswer: ((", None, " A)", "Q?\nAnswer: ((A)"),
        ("Q?\nAnswer: **", None, "A**", "Q?\nAnswer: **A**"),
        ('Q?\nAnswer: "', None, 'A"', 'Q?\nAnswer: "A"'),
        ("Q?\nAnswer: »", None, "A«", "Q?\nAnswer: »A«"),
        ("Q?\nAnswer\uff1a", None, "A", "Q?\nAnswer\uff1aA"),
        ("Q?\nAnswer\uff1a\uff08", None, "A\uff09", "Q?\nAnswer\uff1a\uff08A\uff09"),
        ("Q?\nAnswer:", "\nAnswer: (", "A)", "Q?\nAnswer: (A)"),
        ("Q?\nAnswer: ", "\nAnswer: (", "A)", "Q?\nAnswer: (A)"),
        ("Q?\nAnswer: [", "\nAnswer: (", "A]", "Q?\nAnswer: [A]"),
        ("Q?\nAnswer: (", "\nAnswer: (", "A)", "Q?\nAnswer: (A)"),
        ("Q?\nAnswer:", "\nAnswer: ", "A", "Q?\nAnswer: A"),
        ("Q?\n答案\uff1a", "\n答案\uff1a", "A", "Q?\n答案\uff1aA"),
        ("Q?\n答案\uff1a「", "\n答案\uff1a", "A」", "Q?\n答案\uff1a「A」"),
        ("Q? (", "(", "A)", "Q? (A)"),
        ("Q? (x)\nAnswer: ()", None, "A", "Q? (x)\nAnswer: ()\nAnswer: A"),
        ("Q? Answer: now", None, "A", "Q? Answer: now\nAnswer: A"),
    ],
)
def test_a_prefix_is_never_doubled(
    question: str, prefix: str | None, answer: str, text: str, shared_data: Path
) -> None:
    """Nor where a bracket, white space or a quotation mark stands after it."""
    pair = Pair(question, answer, answer.replace("A", "B"))
    for directory in TOKENIZERS:
        tokenizer = load(shared_data / directory)
        assert_writes(tokenizer, pair, PromptForm(answer_prefix=prefix), text)


def test_a_chat_has_no_prefix() -> None:
    with pytest.raises(ValueError, match="an answer prefix is for the form without chat"):
        PromptForm(chat=True, answer_prefix="(")

"""Contrastive pairs: one question with an answer that shows a behaviour and one that does not.

Three kinds of records are read, as lines of JSON or as one JSON array, and a file may mix them:

- model-written evals and CAA: "question", "answer_matching_behavior" and
  "answer_not_matching_behavior";
- steering-bench: "positive" and "negative", each with a "prompt" and a "response";
- plain texts: "positive" and "negative", each a text.

Other fields are ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model import arguments
from ..model.summary import one_line
from ..tokenizer.paths import read_text, user_path

EVAL_FIELDS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
SIDE_FIELDS = ("positive", "negative")


@dataclass(frozen=True)
class Pair:
    """A question with two answers: one that shows a behaviour, and one that does not.

    question: "" where the two are plain texts. other_question: the question that the other answer
    is given to, where it is not the same. Raises ValueError for a blank answer, for texts that are
    not Unicode, and for two equal sides.
    """

    question: str
    matching: str
    other: str
    other_question: str | None = None

    __repr__ = one_line

    def __post_init__(self) -> None:
        for name in ("question", "matching", "other"):
            _check_unicode(arguments.text(getattr(self, name), name))
        if self.other_question is not None:
            _check_unicode(arguments.text(self.other_question, "other_question"))
        if not self.matching.strip() or not self.other.strip():
            raise ValueError("an answer is empty; give each side a text")
        if self.other_question is not None and not all(self.questions):
            raise ValueError("only one side has a question; give both or none")
        same_question = self.questions[0] == self.questions[1]
        if same_question and self.matching.strip() == self.other.strip():
            raise ValueError("both answers are the same; nothing can be learnt from such a pair")

    @property
    def questions(self) -> tuple[str, str]:
        """The questions that the matching and the other answer are given to."""
        other = self.question if self.other_question is None else self.other_question
        return self.question, other

    @property
    def key(self) -> str:
        """16 hex digits that identify this pair's texts, the same on every machine."""
        asked, other_asked = self.questions
        texts = json.dumps([asked, self.matching, other_asked, self.other])
        return hashlib.sha256(texts.encode()).hexdigest()[:16]


def checked_pairs(pairs: Any) -> list[Pair]:
    """Pairs as a list: one, or a sequence. Raises ValueError for none, and for other objects."""
    found = arguments.all_of(pairs, Pair, "pairs", "a Pair or a list of them (see read_pairs)")
    if not found:
        raise ValueError("no pair is given")
    return found


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file of JSON lines or of one JSON array, in its order.

    Raises ValueError with the file and the line, or the item of an array counted from 1, for broken
    JSON, a field that is missing, empty or no text, and two answers that are equal; with the file
    for one that is missing, not UTF-8, or without a pair.
    """
    text = read_text(user_path(path), "a file of pairs")
    records = _array_items if text.lstrip().startswith("[") else _lines
    pairs = []
    for source, record in records(text, path):
        try:
            pairs.append(_pair_of(record))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    if not pairs:
        raise ValueError(f"{path}: holds no pair; write one JSON object per line")
    return pairs


def _array_items(text: str, path: str | Path) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {_broken(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_broken(error)}") from None
    for number, item in enumerate(items, start=1):
        yield f"{path}, item {number}", item


def _lines(text: str, path: str | Path) -> Iterator[tuple[str, Any]]:
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}: {_broken(error)}") from None
        yield source, record


def _broken(error: Exception) -> str:
    reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    return f"broken JSON ({reason or 'number too large or nesting too deep'})"


def _pair_of(record: Any) -> Pair:
    if not isinstance(record, dict):
        raise ValueError(f"holds {_kind(record)}, not an object with the fields of a pair")
    if any(field in record for field in EVAL_FIELDS):
        question, matching, other = (_text(record, field) for field in EVAL_FIELDS)
        return Pair(question, matching, other)
    if not any(field in record for field in SIDE_FIELDS):
        found = ", ".join(map(str, record)) or "none"
        raise ValueError(
            f"has neither {', '.join(EVAL_FIELDS)} nor {', '.join(SIDE_FIELDS)}; its fields: "
            f"{' '.join(found.split())}"
        )
    positive, negative = (_field(record, field) for field in SIDE_FIELDS)
    if isinstance(positive, dict) and isinstance(negative, dict):
        return _pair_of_prompts(positive, negative)
    if isinstance(positive, dict) or isinstance(negative, dict):
        raise ValueError('one of "positive" and "negative" is a text and one an object')
    return Pair("", _text(record, "positive"), _text(record, "negative"))


def _pair_of_prompts(positive: dict[str, Any], negative: dict[str, Any]) -> Pair:
    question, matching = (_text(positive, field, "positive.") for field in ("prompt", "response"))
    asked, other = (_text(negative, field, "negative.") for field in ("prompt", "response"))
    return Pair(question, matching, other, other_question=None if asked == question else asked)


def _field(record: dict[str, Any], field: str, prefix: str = "") -> Any:
    if field not in record:
        raise ValueError(f'has no field "{prefix}{field}"')
    return record[field]


def _text(record: dict[str, Any], field: str, prefix: str = "") -> str:
    """The field's text, which some files wrap into a list."""
    value = _field(record, field, prefix)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f'"{prefix}{field}" is {_kind(value)}, not a text')
    if not value.strip():
        raise ValueError(f'"{prefix}{field}" is empty')
    return value


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {dict: "an object", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _check_unicode(text: str) -> None:
    """Refuse lone surrogates, which JSON can hold but which are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise ValueError(f"a text holds U+{ord(bad):04X}, which is no character") from None

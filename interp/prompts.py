"""Pairs as token ids, with the positions of the answers and their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..model.config import ModelConfig
from ..model.summary import one_line
from ..parallel.digest import Digest
from ..tokenizer.tokenizer import Tokenizer
from .labels import PromptForm, Written, label_token, quoted, write
from .pairs import Pair

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Side:
    """A prompt with one of the two answers."""

    ids: list[int]
    answer_at: int  # the first token that holds a character of the answer, space aside
    label_at: int | None  # the label's token

    __repr__ = one_line


@dataclass(frozen=True)
class PairIds:
    """A pair as token ids.

    Without labels, `label_at` of both sides, `form` and `is_first` are None. `is_first` is also
    None where the labels do not tell which option was listed first.
    """

    matching: Side
    other: Side
    n_shared: int  # how many ids both sides begin with
    key: str  # the pair's
    form: str | None  # the text of the matching label's token, as the tokenizer cut it
    is_first: bool | None  # whether the matching label is that of the option listed first

    __repr__ = one_line

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.matching, self.other

    @property
    def label_ids(self) -> tuple[int, int]:
        """The ids of the matching label's token and of the other's. ValueError without labels."""
        if self.matching.label_at is None or self.other.label_at is None:
            raise ValueError("this pair has no labels: its answers do not differ in one token")
        return self.matching.ids[self.matching.label_at], self.other.ids[self.other.label_at]


def encode_pair(
    tokenizer: Tokenizer, pair: Pair, form: PromptForm, *, needs_label: bool = True
) -> PairIds:
    """The ids of both sides of `pair`, written as `form` says.

    Without chat the whole text is encoded at once, so that no token is cut where the answer
    begins; white space of an answer that follows white space or an opening bracket is left out. In
    a chat the answer is
    encoded by itself after the template's text, without the white space it begins with.

    Raises ValueError when the two sides have the same tokens, when the tokenizer changes the text
    or has no chat template, and, if `needs_label`, when the two labels are not one token each, two
    different tokens and, for one question, at the same position after the same tokens.
    """
    if not pair.question:
        if needs_label:
            raise ValueError("plain texts have no label: read their last position or their mean")
        return _paired(
            pair, *(_plain(tokenizer, text, form) for text in (pair.matching, pair.other))
        )
    answers = (pair.matching, pair.other)
    written = [
        write(tokenizer, question, answer, form)
        for question, answer in zip(pair.questions, answers, strict=True)
    ]
    sides = [Side(side.ids, side.token_at(side.answer_from), None) for side in written]
    encoded = _paired(pair, *sides)
    try:
        return _with_labels(tokenizer, encoded, written, same_prompt=len(set(pair.questions)) == 1)
    except ValueError:
        if needs_label:
            raise
        return encoded


def encode_contrast(
    tokenizer: Tokenizer, pair: Pair, form: PromptForm, texts: tuple[str, str]
) -> PairIds:
    """The pair's question after one text and after the other, up to the answer's label.

    texts: descriptions of the matching behaviour and of the other, e.g. "You are cautious." They
    come as the system message in a chat, else as a line before the question. The two sides end with
    the token before the label and have no answers. Raises ValueError as `encode_pair` does.
    """
    if not pair.question:
        raise ValueError("plain texts have no question to put a text before")
    sides = []
    for text in texts:
        described = dataclasses.replace(form, system=text) if form.chat else form
        question = pair.question if form.chat else f"{text}\n{pair.question}"
        written = write(tokenizer, question, pair.matching, described)
        end = label_token(tokenizer, written)
        sides.append(Side(written.ids[:end], answer_at=end - 1, label_at=None))
    return _paired(pair, *sides)


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    form: PromptForm,
    *,
    needs_label: bool = True,
    contrast: tuple[str, str] | None = None,
) -> list[PairIds]:
    """`encode_pair` for each pair, or `encode_contrast` if its texts are given.

    Errors begin with the pair's number, counted from 1.
    """
    if contrast is None:
        return map_pairs(
            pairs, lambda pair: encode_pair(tokenizer, pair, form, needs_label=needs_label)
        )
    return map_pairs(pairs, lambda pair: encode_contrast(tokenizer, pair, form, contrast))


def map_pairs(pairs: Sequence[Given], act: Callable[[Given], Made]) -> list[Made]:
    """The list of act(pair). Its errors begin with the pair's number, counted from 1."""
    made = []
    for number, pair in enumerate(pairs, start=1):
        try:
            made.append(act(pair))
        except ValueError as error:
            raise ValueError(f"pair {number}: {error}") from None
    return made


def add_pairs(asked: Digest, encoded: Sequence[PairIds]) -> None:
    """Add to the digest what ranks must have alike of their pairs."""
    for pair in encoded:
        asked.add(pair.key, pair.n_shared)
        for side in pair.sides:
            asked.add(torch.tensor(side.ids), side.answer_at, side.label_at)


def longest(encoded: Sequence[PairIds]) -> list[int]:
    """The ids of the longest side of all pairs, of which there is at least one."""
    return max((side.ids for pair in encoded for side in pair.sides), key=len)


def check_length(n_tokens: int, config: ModelConfig, name: str = "a pair") -> None:
    """Raise ValueError for a text of more tokens than the model's context."""
    if n_tokens > config.context:
        raise ValueError(f"{name} has {n_tokens} tokens, more than the context of {config.context}")


def balance(encoded: Sequence[PairIds]) -> float | None:
    """The share of pairs whose matching label is that of the option listed first.

    None where no label shows it. Far from a half, a vector also encodes a preference for a letter
    or for a position in the list.
    """
    known = [pair.is_first for pair in encoded if pair.is_first is not None]
    return sum(known) / len(known) if known else None


def _plain(tokenizer: Tokenizer, text: str, form: PromptForm) -> Side:
    ids = tokenizer.encode(text, special=not form.plain)
    if len(ids) < 2:
        raise ValueError(
            f"the text {quoted(text)} has nothing after position 0, whose state says nothing of a "
            "text: give texts of two tokens or more"
        )
    return Side(ids, answer_at=int(ids[:1] == [tokenizer.bos_id]), label_at=None)


def _paired(pair: Pair, matching: Side, other: Side) -> PairIds:
    if matching.ids == other.ids:
        raise ValueError("both sides have the same tokens, so their difference is zero everywhere")
    shorter = min(len(matching.ids), len(other.ids))
    differing = (i for i in range(shorter) if matching.ids[i] != other.ids[i])
    n_shared = next(differing, shorter)
    return PairIds(matching, other, n_shared, key=pair.key, form=None, is_first=None)


def _with_labels(
    tokenizer: Tokenizer, pair: PairIds, written: Sequence[Written], *, same_prompt: bool
) -> PairIds:
    """`pair` with its labels; ValueError where they are not as `encode_pair` says."""
    label_at, other_at = (label_token(tokenizer, side) for side in written)
    label, other_label = (side.text[slice(*side.label())] for side in written)
    matching = Side(pair.matching.ids, pair.matching.answer_at, label_at)
    other = Side(pair.other.ids, pair.other.answer_at, other_at)
    form = tokenizer.token_text(matching.ids[label_at])
    other_form = tokenizer.token_text(other.ids[other_at])
    if matching.ids[label_at] == other.ids[other_at]:
        raise ValueError(
            f"both answers have the label {quoted(label)}: choose pairs whose answers begin with "
            "different words"
        )
    if same_prompt and not label_at == other_at == pair.n_shared:
        raise ValueError(
            f"the labels' tokens {quoted(form)} and {quoted(other_form)} do not follow the same "
            'tokens: write both answers alike up to the label, as in "(A)" and "(B)"'
        )
    is_first = _is_first(label, other_label)
    return PairIds(matching, other, pair.n_shared, pair.key, form, is_first)


def _is_first(label: str, other: str) -> bool | None:
    """Whether `label` is listed before `other`, for letters, digits, and Yes before No."""
    ours, theirs = label.casefold(), other.casefold()
    if len(ours) == len(theirs) == 1:
        return ours < theirs
    return ours == "yes" if {ours, theirs} == {"yes", "no"} else None

"""Pairs as token ids, and where in them the answers and their labels stand.

The label of an answer is its first run of letters and digits: the A of " (A)", the Yes of " Yes".
Its token is the one whose characters hold it, whatever else the tokenizer joined to it: "A", " A"
or "(A". To take the last token of a prompt instead goes wrong silently with a tokenizer that keeps
the space apart: both answers then end the prompt alike, and their difference is zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..tokenizer.spans import Span, quoted, token_spans
from ..tokenizer.tokenizer import Tokenizer
from .pairs import Pair

SomePair = TypeVar("SomePair", bound=Pair)
Given = TypeVar("Given")
Made = TypeVar("Made")

# How a line begins that is one of a list of options: "(A)", "A.", "(1):".
_OPTION_MARK = re.compile(r"^\s*(?:\(\w\):?|\w[.:)])(?=\s|$)")


@dataclass(frozen=True)
class PromptForm:
    """How a question and its answer become one text.

    chat: the question is a user's message in the model's chat template, after the `system` message
    if there is one, and the answer begins the reply. If not, the answer follows the question and
    `answer_prefix`. Plain texts are taken as they are in both. Raises ValueError for a system
    message without chat.
    """

    chat: bool = False
    answer_prefix: str = "\nAnswer:"
    system: str | None = None

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise ValueError("a system message needs the chat form; put it into the question")


@dataclass(frozen=True)
class Side:
    """A prompt with one of the two answers."""

    ids: list[int]
    answer_at: int  # the first token that holds a character of the answer, space aside
    label_at: int | None  # the label's token


@dataclass(frozen=True)
class PairIds:
    """A pair as token ids. `label_at` of the sides, `form` and `is_first` are None together, but
    for `is_first`, which is also None where the labels do not tell which option was listed first.
    """

    matching: Side
    other: Side
    n_shared: int  # how many ids both sides begin with
    key: str  # the pair's
    form: str | None  # the text of the matching label's token, as the tokenizer cut it
    is_first: bool | None  # whether the matching label is that of the option listed first

    @property
    def label_ids(self) -> tuple[int, int]:
        """The ids of the matching label's token and of the other's. ValueError without labels."""
        if self.matching.label_at is None or self.other.label_at is None:
            raise ValueError("this pair has no labels: its answers do not differ in one token")
        return self.matching.ids[self.matching.label_at], self.other.ids[self.other.label_at]


def encode_pair(
    tokenizer: Tokenizer, pair: Pair, form: PromptForm, *, needs_label: bool = True
) -> PairIds:
    """Returns the ids of both sides of `pair`, laid out as `form` says.

    Without chat the whole text is encoded at once, so that no token is cut where the answer
    begins; one space is put there where neither side has white space. In a chat the answer is
    encoded by itself after the template's text, without the white space it begins with.

    Raises ValueError when the two sides have the same tokens, when the tokenizer changes the text
    or has no chat template, and, if `needs_label`, when the two labels are not one token each,
    different ones, at the same place after the same tokens (the last only for one question).
    """
    if not pair.question:
        if needs_label:
            raise ValueError("plain texts have no label: read their last position or their mean")
        return _paired(pair, *(_plain(tokenizer, text) for text in (pair.matching, pair.other)))
    answers = (pair.matching, pair.other)
    written = [
        _write(tokenizer, question, answer, form)
        for question, answer in zip(pair.questions, answers, strict=True)
    ]
    sides = [Side(one.ids, one.token_at(one.answer_from), None) for one in written]
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
    """Returns the pair's question after one text and after the other, up to the answer's label.

    texts: what tells of the matching behaviour, and of the other, e.g. "You are cautious." They
    come as a system message in a chat, else as a line before the question. The two sides end with
    the token before the label and have no answers. Raises ValueError as `encode_pair` does.
    """
    if not pair.question:
        raise ValueError("plain texts have no question to put a text before")
    sides = []
    for text in texts:
        own_form = dataclasses.replace(form, system=text) if form.chat else form
        question = pair.question if form.chat else f"{text}\n{pair.question}"
        written = _write(tokenizer, question, pair.matching, own_form)
        end = _label_token(tokenizer, written)
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
    """Returns `encode_pair` of each, or `encode_contrast` if its texts are given.

    Errors begin with the pair's number, counted from 1.
    """
    if contrast is None:
        return of_each(
            pairs, lambda pair: encode_pair(tokenizer, pair, form, needs_label=needs_label)
        )
    return of_each(pairs, lambda pair: encode_contrast(tokenizer, pair, form, contrast))


def of_each(pairs: Sequence[Given], act: Callable[[Given], Made]) -> list[Made]:
    """Returns act(pair) of each. Its errors begin with the pair's number, counted from 1."""
    made = []
    for number, pair in enumerate(pairs, start=1):
        try:
            made.append(act(pair))
        except ValueError as error:
            raise ValueError(f"pair {number}: {error}") from None
    return made


def label_of(answer: str) -> Span:
    """Returns where the label begins and ends: the first run of letters and digits, with accents.

    Raises ValueError when there is none.
    """
    start = next((at for at, character in enumerate(answer) if character.isalnum()), None)
    if start is None:
        raise ValueError(f"the answer {quoted(answer)} has no letter or digit to tell it by")
    end = start + 1
    while end < len(answer) and _continues_word(answer[end]):
        end += 1
    return start, end


def balance(encoded: Sequence[PairIds]) -> float | None:
    """Returns the share of pairs whose matching label is of the option listed first; None if no
    pair tells. Far from a half, a vector also holds the taste for a letter or a place in the list.
    """
    known = [pair.is_first for pair in encoded if pair.is_first is not None]
    return sum(known) / len(known) if known else None


def split_pairs(
    pairs: Sequence[SomePair], share: float, seed: int
) -> tuple[list[SomePair], list[SomePair]]:
    """Returns `pairs` shuffled by `seed` and cut in two, the first part about `share` of them.

    Pairs that ask the same question, be it with its options in another order, stay together. What
    goes where depends on the texts and the seed, not on the order of `pairs`. Raises ValueError
    when a part would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of pairs for the first part is {share}; it is between 0 and 1")
    groups = sorted(_groups(pairs), key=lambda group: _shuffled_place(group, seed))
    first: list[SomePair] = []
    second: list[SomePair] = []
    for group in groups:
        # A group goes where it leaves the first part nearer to its size.
        fits = len(first) + len(group) / 2 <= share * len(pairs)
        (first if fits else second).extend(group)
    if not first or not second:
        raise ValueError(
            f"{len(pairs)} pairs with {len(groups)} different questions cannot be split {share:g} "
            f"to {1 - share:g}; give more questions, or another share"
        )
    return first, second


@dataclass(frozen=True)
class _Written:
    """One side as ids, with the text they are of; in a chat that is the answer alone."""

    ids: list[int]
    spans: list[Span]  # each token's characters in `text`
    text: str
    answer_from: int  # where the answer's first character other than a space is

    def token_at(self, place: int) -> int:
        """The first token that holds the character at `place`."""
        return next(at for at, (start, end) in enumerate(self.spans) if start <= place < end)

    def label(self) -> Span:
        start, end = label_of(self.text[self.answer_from :])
        return self.answer_from + start, self.answer_from + end


def _write(tokenizer: Tokenizer, question: str, answer: str, form: PromptForm) -> _Written:
    prompt: list[int] = []
    if form.chat:
        messages = [{"role": "user", "content": question}]
        if form.system is not None:
            messages.insert(0, {"role": "system", "content": form.system})
        prompt = tokenizer.chat(messages)
        text, answer_from = answer.lstrip(), 0
        ids = tokenizer.encode(text, bos=False)
    else:
        text, answer_from = _joined(question, answer, form.answer_prefix)
        ids = tokenizer.encode(text)
    spans = [(0, 0)] * len(prompt) + token_spans(tokenizer, ids, text)
    return _Written(prompt + ids, spans, text, answer_from)


def _joined(question: str, answer: str, prefix: str) -> tuple[str, int]:
    """The whole text, and where the answer begins in it, white space aside."""
    ending = prefix.strip()
    has_prefix = bool(ending) and question.rstrip().endswith(ending)
    before = question if has_prefix else question + prefix
    bare = answer.lstrip()
    space = "" if before[-1:].isspace() else answer[: len(answer) - len(bare)] or " "
    return before + space + bare, len(before + space)


def _plain(tokenizer: Tokenizer, text: str) -> Side:
    ids = tokenizer.encode(text)
    return Side(ids, answer_at=int(ids[:1] == [tokenizer.bos_id]), label_at=None)


def _paired(pair: Pair, matching: Side, other: Side) -> PairIds:
    if matching.ids == other.ids:
        raise ValueError("both sides have the same tokens, so their difference is zero everywhere")
    shorter = min(len(matching.ids), len(other.ids))
    same = (at for at in range(shorter) if matching.ids[at] != other.ids[at])
    return PairIds(
        matching, other, n_shared=next(same, shorter), key=pair.key, form=None, is_first=None
    )


def _with_labels(
    tokenizer: Tokenizer, pair: PairIds, written: Sequence[_Written], *, same_prompt: bool
) -> PairIds:
    """`pair` with its labels; ValueError where they are not as `encode_pair` says."""
    at, other_at = (_label_token(tokenizer, one) for one in written)
    label, other_label = (one.text[slice(*one.label())] for one in written)
    matching = Side(pair.matching.ids, pair.matching.answer_at, at)
    other = Side(pair.other.ids, pair.other.answer_at, other_at)
    form, other_form = (
        tokenizer.token_text(side.ids[place]) for side, place in ((matching, at), (other, other_at))
    )
    if matching.ids[at] == other.ids[other_at]:
        raise ValueError(
            f"both answers have the label {quoted(label)}: choose pairs whose answers begin with "
            "different words"
        )
    if same_prompt and not at == other_at == pair.n_shared:
        raise ValueError(
            f"the labels' tokens {quoted(form)} and {quoted(other_form)} do not follow the same "
            'tokens: write both answers alike up to the label, as in "(A)" and "(B)"'
        )
    is_first = _is_first(label, other_label)
    return PairIds(matching, other, pair.n_shared, pair.key, form, is_first)


def _label_token(tokenizer: Tokenizer, written: _Written) -> int:
    """The position of the one token that holds the label; ValueError where there is none."""
    start, end = written.label()
    places = [
        at for at, (first, after) in enumerate(written.spans) if first < end and start < after
    ]
    label = quoted(written.text[start:end])
    if len(places) > 1:
        pieces = ", ".join(quoted(tokenizer.token_text(written.ids[at])) for at in places)
        raise ValueError(
            f"the label {label} is {len(places)} tokens ({pieces}): choose pairs whose answers "
            "differ in one token"
        )
    first, after = written.spans[places[0]]
    around = written.text[first:start] + written.text[end:after]
    if any(character.isalnum() for character in around):
        raise ValueError(
            f"the label {label} shares its token {quoted(written.text[first:after])} with other "
            "words: write a space or a bracket around it"
        )
    return places[0]


def _continues_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")


def _is_first(label: str, other: str) -> bool | None:
    """Whether `label` is listed before `other`, for letters, digits, and Yes before No."""
    ours, theirs = label.casefold(), other.casefold()
    if len(ours) == len(theirs) == 1:
        return ours < theirs
    return ours == "yes" if {ours, theirs} == {"yes", "no"} else None


def _groups(pairs: Sequence[SomePair]) -> list[list[SomePair]]:
    """The pairs that share a question, directly or by way of others."""
    parent: dict[object, object] = {}

    def root(subject: object) -> object:
        while parent.setdefault(subject, subject) != subject:
            parent[subject] = subject = parent[parent[subject]]
        return subject

    for pair in pairs:
        first, *others = _subjects(pair)
        for other in others:
            parent[root(other)] = root(first)
    groups = defaultdict(list)
    for pair in pairs:
        groups[root(_subjects(pair)[0])].append(pair)
    return list(groups.values())


def _subjects(pair: Pair) -> list[object]:
    """What a pair is about: its questions, or both of its plain texts together."""
    if not pair.question:
        return [(pair.matching, pair.other)]
    return [_without_order(question) for question in dict.fromkeys(pair.questions)]


def _without_order(question: str) -> tuple[str, ...]:
    """The lines of a question without the marks of options, in an order of their own."""
    lines = (_OPTION_MARK.sub("", line) for line in question.splitlines())
    return tuple(sorted(filter(None, (" ".join(line.split()) for line in lines))))


def _shuffled_place(group: Sequence[Pair], seed: int) -> bytes:
    name = min(pair.key for pair in group)
    return hashlib.sha256(f"{seed} {name}".encode()).digest()

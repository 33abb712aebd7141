"""Where in a text an answer and its label stand, and which token holds the label.

The label of an answer is its first run of letters and digits: the A of " (A)", the Yes of " Yes".
Its token is the one whose characters hold it, whatever else the tokenizer joined to it: "A", " A"
or "(A". To take the last token of a prompt instead goes wrong silently with a tokenizer that keeps
the space apart: both answers then end the prompt alike, and their difference is zero.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from ..tokenizer.spans import Span, quoted, token_spans
from ..tokenizer.tokenizer import Tokenizer


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
class Written:
    """One side of a pair as ids, with the text that they encode: in a chat, the answer alone."""

    ids: list[int]
    spans: list[Span]  # each token's characters in `text`
    text: str
    answer_from: int  # where the answer's first character other than a space is

    def token_at(self, character: int) -> int:
        """The index of the first token that holds the character at an index in `text`."""
        return next(at for at, (start, end) in enumerate(self.spans) if start <= character < end)

    def label(self) -> Span:
        """Where in `text` the label stands."""
        start, end = label_of(self.text[self.answer_from :])
        return self.answer_from + start, self.answer_from + end


def write(tokenizer: Tokenizer, question: str, answer: str, form: PromptForm) -> Written:
    """A question and an answer to it as one text, as `form` says.

    Raises ValueError where the tokenizer changes the text or has no chat template.
    """
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
    return Written(prompt + ids, spans, text, answer_from)


def _joined(question: str, answer: str, prefix: str) -> tuple[str, int]:
    """The whole text, and where the answer begins in it, white space aside."""
    ending = prefix.strip()
    has_prefix = bool(ending) and question.rstrip().endswith(ending)
    before = question if has_prefix else question + prefix
    bare = answer.lstrip()
    space = "" if before[-1:].isspace() else answer[: len(answer) - len(bare)] or " "
    return before + space + bare, len(before + space)


def label_of(answer: str) -> Span:
    """Returns where the label begins and ends: the first run of letters and digits, with accents.

    Raises ValueError when there is none.
    """
    start = next((at for at, character in enumerate(answer) if character.isalnum()), None)
    if start is None:
        raise ValueError(f"the answer {quoted(answer)} has no letter or digit to identify it")
    end = start + 1
    while end < len(answer) and _continues_word(answer[end]):
        end += 1
    return start, end


def label_token(tokenizer: Tokenizer, written: Written) -> int:
    """The position of the one token that holds the label; ValueError where there is none."""
    start, end = written.label()
    holders = [
        at for at, (first, after) in enumerate(written.spans) if first < end and start < after
    ]
    label = quoted(written.text[start:end])
    if len(holders) > 1:
        pieces = ", ".join(quoted(tokenizer.token_text(written.ids[at])) for at in holders)
        raise ValueError(
            f"the label {label} is {len(holders)} tokens ({pieces}): choose pairs whose answers "
            "differ in one token"
        )
    first, after = written.spans[holders[0]]
    around = written.text[first:start] + written.text[end:after]
    if any(character.isalnum() for character in around):
        raise ValueError(
            f"the label {label} shares its token {quoted(written.text[first:after])} with other "
            "words: write a space or a bracket around it"
        )
    return holders[0]


def _continues_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")

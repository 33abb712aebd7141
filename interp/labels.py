"""The positions of an answer and its label in a text, and the token that holds the label.

The label of an answer is its first run of letters and digits: the A of " (A)", the Yes of " Yes".
Its token is the one whose characters hold it, whatever else the tokenizer joined to it: "A", " A"
or "(A". Taking the last token of a prompt instead goes wrong silently with a tokenizer that keeps
the space apart: both prompts then end in the same token, and their difference is zero.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..model import arguments
from ..model.summary import one_line
from ..tokenizer.encoding import Span
from ..tokenizer.tokenizer import Tokenizer

# what `Tokenizer.chat` decides itself
RESERVED = frozenset({"messages", "add_generation_prompt", "special"})
DEFAULT_PREFIX = "\nAnswer:"
# beside brackets and the quotation marks of other scripts, what an answer may be wrapped in
OPENING_MARKS = "\"'`*"


@dataclass(frozen=True)
class PromptForm:
    """How a question and its answer become one text.

    chat: the question is a user's message in the model's chat template, after the `system` message
    if there is one, and the answer begins the reply. If not, the answer follows the question and
    `answer_prefix`, or as much of that as the question does not end with. Texts without a question
    are taken as they are in both. answer_prefix: by default a line "Answer:", with a space after it
    where an answer begins with none; one that is given is taken as it is. template: what else the
    chat template reads, such as {"enable_thinking": False}. plain: names of special tokens are
    plain text, not tokens, as they always are in a chat. Raises ValueError for a system message or
    template variables without chat, and for an answer prefix in one.
    """

    chat: bool = False
    answer_prefix: str | None = None
    system: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False

    __repr__ = one_line

    def __post_init__(self) -> None:
        arguments.flag(self.chat, "chat")
        arguments.flag(self.plain, "plain")
        if self.answer_prefix is not None:
            arguments.text(self.answer_prefix, "answer_prefix")
        if self.system is not None:
            arguments.text(self.system, "system")
        template = arguments.optional(self.template, Mapping, "template", "a mapping of values")
        object.__setattr__(self, "template", template or {})  # frozen, but being constructed
        if self.answer_prefix is not None and self.chat:
            raise ValueError("an answer prefix is for the form without chat: a reply begins alone")
        if self.system is not None and not self.chat:
            raise ValueError("a system message needs the chat form; put it into the question")
        if self.template and not self.chat:
            raise ValueError("variables of a chat template need the chat form")
        for name in self.template:
            if name in RESERVED:
                raise ValueError(f"{name} is no variable that a chat template can be given")

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation up to the reply."""
        user = {"role": "user", "content": question}
        system = {"role": "system", "content": self.system or ""}
        return [user] if self.system is None else [system, user]


def checked_form(form: Any) -> PromptForm:
    """A form, by default the plain one. Raises ValueError for another object."""
    found = arguments.optional(form, PromptForm, "form", "a PromptForm or None")
    return found or PromptForm()


@dataclass(frozen=True)
class Written:
    """One side of a pair as ids, with the text that they encode: in a chat, the answer alone."""

    ids: list[int]
    spans: list[Span]  # each token's characters in `text`
    text: str
    answer_from: int  # where the answer's first character other than a space is

    def token_at(self, character: int) -> int:
        """The index of the first token that holds the character at an index in `text`."""
        spans = enumerate(self.spans)
        return next(index for index, (start, end) in spans if start <= character < end)

    def label(self) -> Span:
        """The span of the label in `text`."""
        start, end = label_of(self.text[self.answer_from :])
        return self.answer_from + start, self.answer_from + end


def encode_prompt(tokenizer: Tokenizer, prompt: str, form: PromptForm) -> list[int]:
    """The ids of a text, or in a chat of a user's message up to the reply.

    Raises ValueError where the model has no chat template, and for a variable that its template
    does not read.
    """
    if not form.chat:
        return tokenizer.encode(prompt, special=not form.plain)
    unread = sorted(form.template.keys() - tokenizer.template_variables)
    if unread:
        read = ", ".join(sorted(tokenizer.template_variables - RESERVED)) or "none"
        raise ValueError(f"the chat template reads no variable {unread[0]!r}; it reads {read}")
    return tokenizer.chat(form.messages(prompt), **form.template)


def write(tokenizer: Tokenizer, question: str, answer: str, form: PromptForm) -> Written:
    """A question and an answer to it as one text, as `form` says.

    Raises ValueError where the tokenizer changes the text or has no chat template.
    """
    prompt: list[int] = []
    if form.chat:
        prompt = encode_prompt(tokenizer, question, form)
        text, answer_from = answer.lstrip(), 0
        encoded = tokenizer.encode_with_spans(text, bos=False, special=False)
    else:
        text, answer_from = _joined(question, answer, form.answer_prefix)
        encoded = tokenizer.encode_with_spans(text, special=not form.plain)
    spans = [(0, 0)] * len(prompt) + encoded.spans
    return Written(prompt + encoded.ids, spans, text, answer_from)


def quoted(text: str) -> str:
    """`text` in double quotes and on one line, for messages."""
    return json.dumps(text, ensure_ascii=False)


def _joined(question: str, answer: str, prefix: str | None) -> tuple[str, int]:
    """The whole text, and where the answer begins in it, white space aside."""
    before = _with_prefix(question, DEFAULT_PREFIX if prefix is None else prefix)
    bare = answer.lstrip()
    space = answer[: len(answer) - len(bare)]
    if before[-1:].isspace() or _is_opening(before[-1:]):
        space = ""
    elif not space and prefix is None and before.endswith(":"):
        space = " "
    return before + space + bare, len(before + space)


def _with_prefix(question: str, prefix: str) -> str:
    """The question, and after it as much of the prefix as it does not end with already."""
    words, opened = _split_opening(prefix.lstrip())
    asked, tail = _split_opening(question)
    if not words:
        is_there = bool(opened.strip()) and question.rstrip().endswith(opened.rstrip())
        return question if is_there else question + prefix
    # its full-width form is the same prefix
    if not unicodedata.normalize("NFKC", asked).endswith(unicodedata.normalize("NFKC", words)):
        return question + prefix
    has_end = bool(tail) and (bool(tail.strip()) or not opened.strip())
    return question if has_end else asked + opened


def _split_opening(text: str) -> tuple[str, str]:
    """`text` in two before the white space, brackets and quotation marks that it ends with."""
    end = len(text)
    while end and _may_open(text[end - 1]):
        end -= 1
    return text[:end], text[end:]


def _may_open(character: str) -> bool:
    # quotation marks of category Pf close in some languages, and open in others
    is_mark = character in OPENING_MARKS or unicodedata.category(character) == "Pf"
    return character.isspace() or is_mark or _is_opening(character)


def _is_opening(character: str) -> bool:
    """Whether a character is an opening bracket or quotation mark of any script."""
    return bool(character) and unicodedata.category(character) in ("Ps", "Pi")


def label_of(answer: str) -> Span:
    """The span of the label in an answer: the first run of letters and digits, with accents.

    Raises ValueError when there is none.
    """
    start = next((index for index, char in enumerate(answer) if char.isalnum()), None)
    if start is None:
        raise ValueError(f"the answer {quoted(answer)} has no letter or digit to identify it")
    end = start + 1
    while end < len(answer) and _continues_word(answer[end]):
        end += 1
    return start, end


def label_token(tokenizer: Tokenizer, written: Written) -> int:
    """The position of the one token that holds the label; ValueError where there is none."""
    start, end = written.label()
    spans = enumerate(written.spans)
    holders = [index for index, (first, after) in spans if first < end and start < after]
    label = quoted(written.text[start:end])
    if len(holders) > 1:
        pieces = ", ".join(quoted(tokenizer.token_text(written.ids[index])) for index in holders)
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

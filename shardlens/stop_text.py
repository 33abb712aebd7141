"""Texts that end a generation, found in the text of its tokens wherever they are cut."""

from __future__ import annotations

from collections.abc import Sequence

from .engine.request import Ends
from .tokenizer.tokenizer import Tokenizer


class StoppedText:
    """The text of new tokens as they come, up to the first stop text.

    Text that may turn out to be the beginning of a stop text is held back until that is known.
    `has_stopped`: whether a stop text was found; nothing comes after it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._stream, self._stop = tokenizer.stream(), tuple(stop)
        self._held = ""
        self.has_stopped = False

    def push(self, token: int) -> str:
        """The text that a token adds, maybe empty."""
        return self._add(self._stream.push(token))

    def flush(self) -> str:
        """The text that is left when no token comes any more."""
        text = self._add(self._stream.flush())
        if self.has_stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _add(self, text: str) -> str:
        if self.has_stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        self.has_stopped = bool(found)
        end = min(found) if found else len(text) - self._n_open(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def _n_open(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop text."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)),
            0,
        )


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of new tokens, up to the first stop text."""
    stopped = StoppedText(tokenizer, stop)
    return "".join(map(stopped.push, tokens)) + stopped.flush()


def ends_at(tokenizer: Tokenizer, stop: Sequence[str], also: Ends | None = None) -> Ends:
    """A function for `Request.ends`, of one generation: whether its text holds a stop text.

    also: another such function, asked each time.
    """
    stopped, n_seen = StoppedText(tokenizer, stop), 0

    def ends(tokens: Sequence[int]) -> bool:
        nonlocal n_seen
        for token in tokens[n_seen:]:
            stopped.push(token)
        n_seen = len(tokens)
        ends_too = also is not None and also(tokens)
        return stopped.has_stopped or ends_too

    return ends


def stop_texts(tokenizer: Tokenizer, given: str | Sequence[str]) -> tuple[str, ...]:
    """The stop texts of a request; ValueError for those that no text can hold."""
    texts = (given,) if isinstance(given, str) else tuple(given)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop {text!r} is not a text of at least one character")
    names = {tokenizer.token_text(token) for token in tokenizer.special_ids} if texts else set()
    for text in texts:
        if text in names:
            raise ValueError(f"stop {text!r} is a special token, no text: give its id in stop_ids")
    return texts

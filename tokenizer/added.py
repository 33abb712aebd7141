"""Tokens that are found in a text before the vocabulary's own splitting: `<|eot_id|>`, `<think>`.

A `tokenizer.json` is read by a library that finds them itself. Rank files and sentencepiece models
know nothing of the tokens that other files add to them; for those they are found here, the leftmost
and then the longest first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .encoding import MOST_ADDED, Encoded, Span, check_count

_FLAGS = ("special", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class AddedToken:
    """A token by name. lstrip, rstrip: white space around it is part of it."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False  # only where no letter, digit or underscore touches it
    normalized: bool = False  # whether it is looked for in the normalised text

    @classmethod
    def from_entry(cls, id: int, entry: Mapping[str, Any], *, path: Path | str) -> AddedToken:
        """Returns the token that one entry of a Hugging Face file describes.

        Raises ValueError, naming the file and the id, for an entry without a text.
        """
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(content, str) or not content:
            raise ValueError(f"{path}: the added token with id {id} has no content")
        flags = {name: entry.get(name, False) for name in _FLAGS}
        flags["normalized"] = entry.get("normalized", not flags["special"])
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(
                    f"{path}: {name} of the added token with id {id} is {ascii(flag)[:80]}, not "
                    "true or false"
                )
        return cls(id=id, content=content, **flags)

    @property
    def pattern(self) -> str:
        """A regular expression for the token and what it takes with it."""
        before = r"\s*" if self.lstrip else ""
        after = r"\s*" if self.rstrip else ""
        edges = (r"(?<!\w)", r"(?!\w)") if self.single_word else ("", "")
        return before + edges[0] + re.escape(self.content) + edges[1] + after


class AddedTokens:
    """The added tokens of a vocabulary, found in texts."""

    def __init__(self, tokens: Iterable[AddedToken], *, path: Path | str) -> None:
        self.tokens = list(tokens)
        self.ids = {token.content: token.id for token in self.tokens}
        if len(set(self.ids.values())) != len(self.tokens):
            raise ValueError(f"{path}: two added tokens have the same id or the same text")
        self._all = _Finder(self.tokens)
        self._ordinary = _Finder([token for token in self.tokens if not token.special])

    def encode(
        self, text: str, *, special: bool, encode_stretch: Callable[[int, int], Encoded]
    ) -> Encoded:
        """The ids of a text: of its added tokens, and of the stretches start:end between them."""
        finder = self._all if special else self._ordinary
        ids, spans, done = list[int](), list[Span](), 0
        for (start, end), id in [*finder.find(text), ((len(text), len(text)), None)]:
            if done < start:
                stretch = encode_stretch(done, start)
                ids += stretch.ids
                spans += stretch.spans
            if id is not None:
                ids.append(id)
                spans.append((start, end))
            done = end
        return Encoded(ids, spans)


def configured_tokens(settings: Mapping[str, Any], path: Path | str) -> list[AddedToken]:
    """The `added_tokens_decoder` of a tokenizer_config.json at `path`, by id.

    Raises ValueError, naming the file, for another form than {"id": {"content": text}}.
    """
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, Mapping):
        raise ValueError(f"{path}: added_tokens_decoder is not a JSON object")
    check_count(len(listed), MOST_ADDED, "added tokens", path)
    tokens = []
    for id, entry in listed.items():
        if not id.isascii() or not id.isdigit() or len(id) > 9:
            raise ValueError(f"{path}: added_tokens_decoder has the id {id[:40]!r}, not a number")
        tokens.append(AddedToken.from_entry(int(id), entry, path=path))
    return tokens


def named_tokens(names: Mapping[str, Any], path: Path | str) -> list[AddedToken]:
    """The tokens of an added_tokens.json at `path`: {text: id}. None of them is special.

    Raises ValueError, naming the file, for an id that is no number.
    """
    check_count(len(names), MOST_ADDED, "added tokens", path)
    for text, id in names.items():
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < 10**9 or not text:
            raise ValueError(f"{path}: token {text[:40]!r} has the id {str(id)[:40]}, not a number")
    return [AddedToken(id, text, special=False) for text, id in names.items()]


class _Finder:
    """Finds the leftmost and then the longest of some tokens."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
        self._ids = {token.content: token.id for token in longest_first}
        # no group per token: without, the search goes by the beginning that all of them share
        self._pattern = re.compile("|".join(token.pattern for token in longest_first) or "(?!)")

    def find(self, text: str) -> Iterator[tuple[Span, int]]:
        for match in self._pattern.finditer(text):
            found = match.group()
            spellings = (found, found.lstrip(), found.rstrip(), found.strip())
            yield match.span(), next(self._ids[t] for t in spellings if t in self._ids)

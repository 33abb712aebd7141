"""Where in a text each of its tokens stands.

The bytes of the tokens, one after the other, are the text's, but for what a tokenizer puts in: a
BOS, a space before the text (sentencepiece), composed characters (NFC). The tokens are walked along
the text, and where the bytes are not the text's the tokenizer has changed it: an error.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .tokenizer import Tokenizer

Span = tuple[int, int]

# Where sentencepiece models put a space, and whether they do so before another space, too.
_SPACE_RULES = (
    ("never", False),
    ("first", True),
    ("first", False),
    ("always", True),
    ("always", False),
)


def token_spans(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[Span]:
    """Returns for each of `ids`, which encode `text`, its first character and the one after it.

    A token of a part of a character spans the whole character; one that stands for no text, such
    as the BOS, spans none. The space that sentencepiece puts before a text belongs to no token.
    Raises ValueError when the ids do not give the text back.
    """
    tokens = [(id in tokenizer.special_ids, tokenizer.token_bytes(id)) for id in ids]
    # A text may spell the BOS itself; the one before it is still not the text's.
    silent = (1, 0) if ids and ids[0] == tokenizer.bos_id else (0,)
    for spelling in _spellings(text):
        for n_silent, rule in itertools.product(silent, _SPACE_RULES):
            walked = _walk(tokens[n_silent:], spelling.data, *rule)
            if walked is not None:
                return [(0, 0)] * n_silent + [spelling.characters(span) for span in walked]
    raise ValueError(_change(text, tokenizer.decode(ids)))


def quoted(text: str) -> str:
    """`text` in double quotes and on one line, for messages."""
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class _Spelling:
    """Bytes that spell a text, and for each of them the characters of the text it comes from."""

    data: bytes
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, parts: Iterator[tuple[str, int, int]]) -> _Spelling:
        """From (spelt, start, end): what the characters from start to end are written as."""
        data, starts, ends = bytearray(), list[int](), list[int]()
        for spelt, start, end in parts:
            new = spelt.encode()
            data += new
            starts += [start] * len(new)
            ends += [end] * len(new)
        return cls(bytes(data), starts, ends)

    def characters(self, span: Span) -> Span:
        first, after = span
        if first < after:
            return self.starts[first], self.ends[after - 1]
        at = self.starts[first] if first < len(self.starts) else max(self.ends, default=0)
        return at, at


def _spellings(text: str) -> Iterator[_Spelling]:
    yield _Spelling.of((character, at, at + 1) for at, character in enumerate(text))
    if not unicodedata.is_normalized("NFC", text):
        yield _Spelling.of(_composed_parts(text))


def _composed_parts(text: str) -> Iterator[tuple[str, int, int]]:
    """The NFC of `text`, in the smallest parts that are composed apart from one another."""
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or _stands_alone(text[start:end], text[end]):
            composed = unicodedata.normalize("NFC", text[start:end])
            if composed == text[start:end]:
                yield from ((text[at], at, at + 1) for at in range(start, end))
            else:
                yield composed, start, end
            start = end


def _stands_alone(before: str, character: str) -> bool:
    """Whether composition never joins `character` with what is before it."""
    if character.isascii():
        return True
    if unicodedata.combining(character):
        return False
    parts = (unicodedata.normalize("NFC", part) for part in (before, character))
    return unicodedata.normalize("NFC", before + character) == "".join(parts)


def _walk(
    tokens: Sequence[tuple[bool, bytes]], data: bytes, prefixed: str, doubles: bool
) -> list[Span] | None:
    """The spans of (special, bytes) tokens in `data`, or None where they do not spell it.

    prefixed: "first" or "always" if a space was put before the text, or before every stretch
    between special tokens; doubles: even before a space.
    """
    spans: list[Span] = []
    at, fresh = 0, prefixed != "never"
    for special, piece in tokens:
        if special and not data.startswith(piece, at):
            piece = b""
        elif special:
            fresh = prefixed == "always"
        elif fresh:
            fresh = False
            if doubles or not data.startswith(b" ", at):
                piece = piece.removeprefix(b" ")
        if not data.startswith(piece, at):
            return None
        spans.append((at, at + len(piece)))
        at += len(piece)
    return spans if at == len(data) else None


def _change(text: str, read_back: str) -> str:
    both = zip(text, read_back, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], both))
    shown = slice(max(0, same - 10), same + 20)
    return (
        f"the tokenizer changes the text: {quoted(text[shown])} is read as "
        f"{quoted(read_back[shown])}; write the text as the tokenizer does"
    )

"""The face that every kind of vocabulary has: text to ids, and each token's place in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from .visible import running

Span = tuple[int, int]  # the first character of a text, and the one after the last

SPACE = "\u2581"  # how vocabularies of sentencepiece's kind write a space
_LONE = re.compile("[\ud800-\udfff]")  # halves of characters, and bytes that are no UTF-8
MOST_TOKENS = 1_000_000  # of a vocabulary, and of its merges; Llama 3 has 280,000 of these
MOST_ADDED = 200_000  # tokens
MOST_CHARACTERS = 4_000_000  # of one text: its encoding then takes seconds and under 1 GB


class Encoded(NamedTuple):
    """Token ids of a text, and the characters of it that each stands for."""

    ids: list[int]
    spans: list[Span]


class Encoder(Protocol):
    """A vocabulary. `pieces`: the bytes of every id, a special token's being its name.

    `special`: ids, by name, of the tokens that stand for no text. `added`: those and all others
    that are found in a text before the vocabulary's own splitting. `before`, `after`: ids that
    the model's own rule puts around a text. `drops_leading_space`: whether a text read back loses
    the space that was put before it.
    """

    @property
    def pieces(self) -> Mapping[int, bytes]: ...
    @property
    def special(self) -> Mapping[str, int]: ...
    @property
    def added(self) -> Mapping[str, int]: ...
    @property
    def before(self) -> list[int]: ...
    @property
    def after(self) -> list[int]: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def drops_leading_space(self) -> bool: ...
    def encode(self, text: str, *, special: bool, inside: bool) -> Encoded:
        """Nothing is put around the text.

        special: whether a special token's name in the text gives that token. inside: whether the
        text follows a token, so that it is not the start of a text.
        """
        ...


def check_count(n: int, most: int, what: str, path: Path | str) -> None:
    """Raise ValueError naming the file for one that holds too many of something to be read."""
    if n > most:
        raise ValueError(f"{path} holds {n:,} {what}: at most {most:,} are read")


def check_text(text: str) -> None:
    """Raise ValueError for a text that no vocabulary has bytes for, or too long to encode."""
    lone = _LONE.search(text)
    if lone is not None:
        raise ValueError(
            f"character {lone.start() + 1} of the text, {running(lone[0])}, is not valid UTF-8"
        )
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"a text of {len(text):,} characters is longer than {MOST_CHARACTERS:,}: split it"
        )


@contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """Turn whatever a library in Rust or C++ raises, a panic included, into a ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{doing}: {reason}") from None

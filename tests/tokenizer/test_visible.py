"""Hidden characters of a text are shown, whatever shows it; all others are as they were."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from shardlens.tokenizer.visible import HIDDEN, cell, decoded, one_line, running


def is_hidden(character: str) -> bool:
    return unicodedata.category(character) in HIDDEN


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x00\x7f", "<1B>[2J<00><7F>"),
        ("\x85\x9b", "<0085><009B>"),
        (
            "\u061c\u200e\u200f\u202a\u202e\u2066\u2069",
            "<061C><200E><200F><202A><202E><2066><2069>",
        ),
        ("\u2028\u2029\ufeff\u00ad\u200d", "<2028><2029><FEFF><00AD><200D>"),
        ("\U000e0041", "<E0041>"),
        ("\udcd7\ud800", "<D7><D800>"),
        (
            "é e\u0301 日本 👩 \u00a0 [red] :bomb: <1B>",
            "é e\u0301 日本 👩 \u00a0 [red] :bomb: <1B>",
        ),
    ],
)
def test_forms(text: str, shown: str) -> None:
    assert running(text) == cell(text) == shown
    assert one_line(f"|{text}|").isprintable()


def test_white_space() -> None:
    assert running(" a\tb\r\nc ") == " a\tb<0D>\nc "
    assert cell("  a\tb\r\nc ") == "··a⇥b<0D>⏎c·"
    assert cell("   ") == "···" and cell(" ") == "·" and cell("") == running("") == ""
    assert one_line(" a\tb\r\n  c\u2028d ") == "a b c d"


def test_every_character() -> None:
    """Characters of no width or shape are shown, no two alike, and no others are touched."""
    everything = [chr(code) for code in range(sys.maxunicode + 1)]
    for character in everything:
        found = {running(character), cell(character)}
        if character in "\n\t ":
            continue
        if is_hidden(character):
            (shown,) = found
            assert shown.isprintable() and shown.startswith("<") and shown.isascii()
        else:
            assert found == {character}
    assert one_line("".join(everything)).isprintable()
    named = [running(c) for c in everything if is_hidden(c)]
    assert len(named) == len(set(named))


def test_parts_of_a_character() -> None:
    whole = "é🦙".encode()
    assert decoded(whole) == "é🦙"
    assert decoded(whole[1:4]) == "<A9><F0><9F>"
    assert decoded(b"a\xff\xed\xb3\x97") == "a<FF><ED><B3><97>"  # the last three: a half, encoded
    assert decoded(b"\x1b") == "\x1b", "a whole character, to be shown where it is displayed"

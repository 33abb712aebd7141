"""Text of models and of strangers, made safe to look at: nothing that a reader cannot see is kept.

A terminal obeys control characters, and no reader sees them or those that turn the direction of a
line. They are shown in angle brackets: with two hex digits an ASCII control character, or a byte
that is no UTF-8 (`<1B>`, `<D7>`); with four or more any other character (`<009B>`, `<202E>`). Files
for programs, JSON and Parquet, keep a text as it is.
"""

from __future__ import annotations

import re
import unicodedata

# control, format (those of direction among them), lone surrogate; line and paragraph separator
HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_MARKS = {"\n": "⏎", "\t": "⇥"}
# what Python reads a byte as that is no UTF-8, in the words of a command and in names of files
_LONE_BYTES = range(0xDC80, 0xDD00)


def running(text: str) -> str:
    """A text over several lines, which keeps its line breaks and tabs."""
    return text if text.isprintable() else "".join(c if c in _MARKS else _shown(c) for c in text)


def cell(text: str) -> str:
    """A text in a table: a line break is ⏎, a tab ⇥, and an outer space a middle dot."""
    shown = "".join(_MARKS.get(c) or _shown(c) for c in text)
    inner = shown.strip(" ")
    left = len(shown) - len(shown.lstrip(" "))
    return "·" * left + inner + "·" * (len(shown) - left - len(inner))


def one_line(text: str) -> str:
    """An error: white space is a space, and whatever is not printable is shown."""
    return "".join(c if c.isprintable() else _named(c) for c in " ".join(text.split()))


def decoded(part: bytes) -> str:
    """The text of some bytes; those that are no UTF-8 by themselves are shown."""
    text = part.decode("utf-8", errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda found: _named(found[0]), text)


def _shown(character: str) -> str:
    return _named(character) if unicodedata.category(character) in HIDDEN else character


def _named(character: str) -> str:
    code = ord(character)
    if code in _LONE_BYTES:
        return f"<{code - 0xDC00:02X}>"
    return f"<{code:02X}>" if code < 0x80 else f"<{code:04X}>"

"""Texts that would command a terminal, a page or a picture; a trace of them; and a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import termios
import threading
import tty
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shardlens.interp import Trace
from shardlens.model import Tap

TEXTS = [
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[31mred",
    "\x1bP+q\x1b\\",
    "\x9b31m \x85",
    "bell\x07 back\b\b\bxx",
    "safe\rEVIL",
    "\x00\x0b\x0c\x7f",
    "a\tb\n\nc\r\nd",
    "  outer  ",
    "\u202etxt.exe\u202c",
    "\u2066a\u2067b\u2069",
    "\u200e\u200f\u061c",
    "zero\u200bwidth\u200d\ufeff\u00ad",
    "tag\U000e0041\U000e007f",
    "line\u2028paragraph\u2029end",
    "\udcd7\udcff",
    "\ud800 half",
    "[red]no markup[/red] [/] [link=x]",
    ":bomb: :smile:",
    "\\[bold] \\",
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)" x="',
    "</td></table><img src=//x onerror=alert(1)>",
    "<!-- ]]> &lt;b&gt; &#27; &amp;",
    "<style>@import 'x'</style><base href=//x>",
    "$x^2$ \\$ $\\frac{1}{",
    "日本語のテキスト",
    "👩‍💻🦙 emoji ✈️",
    "e" + "\u0301" * 20,
    "x" * 500 + "{0} %s {title}",
]
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
TAPS = (Tap(0, "resid_post"), Tap(1, "resid_post"))
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # what rich itself may send


def hidden_in(text: str, *, but: str = "") -> set[str]:
    return {c for c in text if unicodedata.category(c) in HIDDEN} - set(but)


def traced(texts: list[str]) -> Trace:
    """A trace at whose positions and in whose cells the texts are tokens."""
    n, k = len(texts), 3
    ids = torch.arange(n)[:, None, None] + torch.arange(k)
    return Trace(
        taps=TAPS,
        positions=torch.arange(n),
        targets=torch.arange(n),
        token_ids=(ids % n).expand(n, 2, k).contiguous(),
        logprobs=torch.tensor([-0.1, -3.0, -4.0]).expand(n, 2, k).contiguous(),
        entropy=torch.zeros(n, 2),
        target_logprob=torch.full((n, 2), -0.1),
        target_rank=torch.zeros(n, 2, dtype=torch.int64),
        kl_to_final=torch.zeros(n, 2),
        input_ids=list(range(n)),
        names=dict(enumerate(texts)),
    )


@contextmanager
def pseudo_terminal() -> Iterator[tuple[io.TextIOWrapper, list[bytes]]]:
    """A terminal to write to, and what arrives there, byte by byte, once it is closed."""
    reading, writing = pty.openpty()
    tty.setraw(writing, termios.TCSANOW)  # or line breaks would become two characters
    found: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(reading, 65536):
                found.append(part)
        except OSError:  # how a closed pseudo-terminal ends
            pass

    reader = threading.Thread(target=read)
    reader.start()
    terminal = os.fdopen(writing, "w", encoding="utf-8")
    try:
        yield terminal, found
    finally:
        terminal.close()
        reader.join(20)
        os.close(reading)

"""The console that commands print to, which shows a stranger's text as text and as nothing else."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from .tokenizer.visible import running

WIDTH = 100  # of a file or pipe, which has none; rich would take 80


class PlainConsole(Console):
    """A console that takes every text for what it is: no markup, no emoji code, no control."""

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(running(text), **settings)


def open_console(*, quiet: bool = False) -> PlainConsole:
    """A console on standard output."""
    width = None if Console().is_terminal else WIDTH
    return PlainConsole(highlight=False, markup=False, emoji=False, quiet=quiet, width=width)


def print_running(text: str, console: Console, style: str = "") -> None:
    """Print a text as it is but for its hidden characters, and stay on its last line.

    rich would turn tabs into spaces and drop spaces at the end of a long line.
    """
    segments = Segments([Segment(running(text), console.get_style(style))])
    console.print(segments, end="", soft_wrap=True)
    console.file.flush()

"""A Trace on a terminal: layers down, positions across, the likeliest token in each cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..model.points import Tap
from .trace import Trace

WIDTH = 100
CELL = 11
SHOWN_POSITIONS = 64


def print_trace(trace: Trace, console: Console) -> None:
    """Print the last SHOWN_POSITIONS positions, as many side by side as the width allows."""
    n_positions = len(trace.positions)
    first = max(0, n_positions - SHOWN_POSITIONS)
    if first:
        console.print(
            f"[dim]the last {n_positions - first} of {n_positions} positions; "
            "--json and --out hold all[/]"
        )
    label_width = max(len(tap_label(trace.taps, tap)) for tap in range(len(trace.taps)))
    across = max(1, (min(WIDTH, console.width) - label_width) // (CELL + 1))
    for start in range(first, n_positions, across):
        console.print(_table(trace, range(start, min(n_positions, start + across)), label_width))


def _table(trace: Trace, places: range, label_width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("token", width=label_width, no_wrap=True, style="dim")
    for at in places:
        token = visible(trace.token_at(int(trace.positions[at])))
        table.add_column(Text(_fitted(token, CELL)), width=CELL, no_wrap=True)
    for tap in reversed(range(len(trace.taps))):
        table.add_row(tap_label(trace.taps, tap), *(_cell(trace, at, tap) for at in places))
    table.add_section()
    table.add_row("target", *(Text(_fitted(visible(trace.target_text(at)), CELL)) for at in places))
    return table


def _cell(trace: Trace, at: int, tap: int) -> Text:
    probability = math.exp(float(trace.logprobs[at, tap, 0]))
    token = visible(trace.text_of(int(trace.token_ids[at, tap, 0])))
    hit = trace.token_ids[at, tap, 0] == trace.targets[at]
    share = f"{probability:.2f}".removeprefix("0") if probability < 0.995 else "1.0"
    name = _fitted(token, CELL - 4)
    return Text(f"{name:<{CELL - 4}} {share}", style=_style(probability, bool(hit)))


def _style(probability: float, hit: bool) -> str:
    """Grey to green as the model gets surer; bold where it is right."""
    grey, green = (120, 120, 120), (60, 200, 90)
    mixed = (round(a + (b - a) * probability) for a, b in zip(grey, green, strict=True))
    return ("bold " if hit else "") + f"rgb({','.join(map(str, mixed))})"


def tap_label(taps: Sequence[Tap], index: int) -> str:
    """ "layer 3", or "3 attn_out" where several points are shown."""
    tap = taps[index]
    return f"layer {tap.layer}" if len({t.point for t in taps}) == 1 else f"{tap.layer} {tap.point}"


def visible(token: str) -> str:
    """Spaces and line ends of a token made visible."""
    shown = token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    if shown.strip(" ") == "":
        return "·" * len(shown)
    return "·" + shown[1:] if shown.startswith(" ") else shown


def _fitted(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"

"""A Trace on a terminal: layers down, positions across, the likeliest token in each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import set_cell_size

from .trace import Trace
from .trace_grid import Cell, Grid, fitted, tap_labels

if TYPE_CHECKING:  # imported where it is used: rich draws from Python's random numbers when it is
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

WIDTH = 100
CELL = 11
SHOWN_POSITIONS = 64


def print_trace(trace: Trace, console: Console) -> None:
    """Print the last SHOWN_POSITIONS positions, as many side by side as the width allows."""
    from rich.text import Text

    n_positions = len(trace.positions)
    first = max(0, n_positions - SHOWN_POSITIONS)
    if first:
        shown = f"the last {n_positions - first} of {n_positions} positions"
        console.print(Text(f"{shown}; --json and --out hold all", style="dim"))
    label_width = max(map(len, tap_labels(trace.taps)))
    across = max(1, (min(WIDTH, console.width) - label_width) // (CELL + 1))
    for start in range(first, n_positions, across):
        grid = trace.grid(range(start, min(n_positions, start + across)))
        console.print(_table(grid, label_width))


def _table(grid: Grid, label_width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("token", width=label_width, no_wrap=True, style="dim")
    for token in grid.tokens:
        table.add_column(Text(fitted(token, CELL)), width=CELL, no_wrap=True)
    for label, cells in zip(reversed(grid.labels), reversed(grid.cells), strict=True):
        table.add_row(label, *map(_cell, cells))
    table.add_section()
    table.add_row("target", *(Text(fitted(target, CELL)) for target in grid.targets))
    return table


def _cell(cell: Cell) -> Text:
    from rich.text import Text

    share = f"{cell.probability:.2f}".removeprefix("0") if cell.probability < 0.995 else "1.0"
    name = fitted(cell.token, CELL - 4)
    return Text(
        f"{set_cell_size(name, CELL - 4)} {share}", style=_style(cell.probability, cell.is_hit)
    )


def _style(probability: float, is_hit: bool) -> str:
    """Grey to green as the model gets surer; bold where it is right."""
    grey, green = (120, 120, 120), (60, 200, 90)
    mixed = (round(a + (b - a) * probability) for a, b in zip(grey, green, strict=True))
    return ("bold " if is_hit else "") + f"rgb({','.join(map(str, mixed))})"

"""Files of a trace: JSON for programs, HTML and PNG for people, Parquet for tables."""

from __future__ import annotations

import html
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.files import replacing, require
from .trace_grid import Cell, Grid, fitted

FORMATS = (".json", ".html", ".png", ".parquet")
# the packages that a format needs, and the extras that have them
NEEDS = {".png": ("matplotlib", "plot"), ".parquet": ("pyarrow", "parquet")}

# A picture with more positions than this has no room for their tokens.
PNG_POSITIONS = 60
PNG_COLUMNS = 12  # of a text, which a cell has room for

# The policy comes before any content: whatever a page holds, it runs and loads nothing.
PAGE = """<!doctype html><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>{title}</title>
<style>
body {{ font: 13px system-ui, sans-serif; margin: 1.5em; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: 3px 7px; border: 1px solid #ddd; white-space: nowrap; text-align: left; }}
th {{ position: sticky; left: 0; background: #fff; font-weight: 600; }}
tr.input th, tr.target th {{ color: #666; }}
</style>
<p>Each cell: the likeliest next token under the lens of that layer (down) at that position
(across), shaded by its probability. Hover for the others, entropy and KL to the final layer.</p>
<div style="overflow-x: auto"><table>
{rows}
</table></div>
"""


def check_format(path: Path) -> None:
    """Raise ValueError if the ending of `path` names no format that can be written here."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: a trace is written as {', '.join(FORMATS)}, by the ending")
    if path.suffix in NEEDS:
        require(*NEEDS[path.suffix], str(path))


def write_html(grid: Grid, path: Path) -> None:
    """Write a page with a table of the cells. Raises as `replacing` does."""

    def row(kind: str, label: str, cells: Sequence[str]) -> str:
        return f'<tr class="{kind}"><th>{html.escape(label)}</th>{"".join(cells)}</tr>'

    def plain(tokens: Sequence[str]) -> list[str]:
        return [f"<td>{html.escape(token)}</td>" for token in tokens]

    layers = zip(reversed(grid.labels), reversed(grid.cells), strict=True)
    rows = [
        row("input", "token", plain(grid.tokens)),
        *(row("layer", label, list(map(_html_cell, cells))) for label, cells in layers),
        row("target", "target", plain(grid.targets)),
    ]
    page = PAGE.format(title="lens", rows="\n".join(rows))
    with replacing(path) as file:
        file.write(page.encode())


def _html_cell(cell: Cell) -> str:
    lines = [f"{text}  {probability:.4f}" for text, probability in cell.candidates]
    lines.append(f"entropy {cell.entropy:.3f} nats")
    lines.append(f"KL to final {cell.kl_to_final:.3f} nats")
    if cell.target is not None:
        rank, probability = cell.target
        lines.append(f"target: rank {rank}, probability {probability:.4f}")
    title = html.escape("\n".join(lines), quote=True)
    shade = f"background: rgba(34, 139, 94, {cell.probability:.2f})"
    return f'<td style="{shade}" title="{title}">{html.escape(cell.token)}</td>'


def write_png(grid: Grid, path: Path) -> None:
    """Draw the cells, shaded by probability. Raises as `replacing` does."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_taps, n_positions = len(grid.labels), len(grid.tokens)
    width = min(n_positions, PNG_POSITIONS)
    figure = Figure(figsize=(2 + 0.8 * width, 1 + 0.32 * n_taps), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    probabilities = np.array([[cell.probability for cell in cells] for cells in grid.cells])
    image = axes.imshow(probabilities, aspect="auto", origin="lower", cmap="Greens", vmin=0, vmax=1)
    axes.set_yticks(range(n_taps), grid.labels)
    if n_positions <= PNG_POSITIONS:
        _png_texts(grid, axes)
    else:
        axes.set_xlabel("position")
    figure.colorbar(image, label="probability")
    with replacing(path) as file, warnings.catch_warnings():
        # a line for each character that the font lacks; the picture has a box there
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
        figure.savefig(file, dpi=150, format="png")


def _png_texts(grid: Grid, axes: Any) -> None:
    """Name each cell's likeliest token, and the token at each position."""
    plain = {"parse_math": False}  # a dollar sign is one
    for tap, position in itertools.product(range(len(grid.labels)), range(len(grid.tokens))):
        cell = grid.cells[tap][position]
        color = "white" if cell.probability > 0.6 else "black"
        text = fitted(cell.token, PNG_COLUMNS)
        axes.text(position, tap, text, ha="center", va="center", fontsize=7, color=color, **plain)
    tokens = [fitted(token, PNG_COLUMNS) for token in grid.tokens]
    axes.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right", **plain)


def write_parquet(columns: dict[str, list[Any]], path: Path) -> None:
    """Write a table of named columns. Raises as `replacing` does."""
    import pyarrow
    from pyarrow import parquet

    with replacing(path) as file:
        parquet.write_table(pyarrow.table(columns), file)

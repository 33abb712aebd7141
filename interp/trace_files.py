"""A Trace as a file: JSON for programs, HTML and PNG for people, Parquet for tables."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..engine.files import replacing, require, write_json
from .trace import Trace
from .trace_table import tap_label, visible

# A picture of more positions than this has no room for their tokens.
PNG_POSITIONS = 60

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
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


def save_trace(trace: Trace, path: Path) -> None:
    """Write `trace` in the format that the ending of `path` names. Raises ValueError."""
    _writer(path)(trace, path)


def check_format(path: Path) -> None:
    """Raise ValueError if the ending of `path` names no format that can be written here."""
    _writer(path)
    needs = {".png": ("matplotlib", "plot"), ".parquet": ("pyarrow", "parquet")}.get(path.suffix)
    if needs is not None:
        require(*needs, str(path))


def _writer(path: Path) -> Callable[[Trace, Path], None]:
    writers = {".json": _json, ".html": _html, ".png": _png, ".parquet": _parquet}
    if path.suffix not in writers:
        raise ValueError(f"{path}: a trace is written as {', '.join(writers)}, by the ending")
    return writers[path.suffix]


def _json(trace: Trace, path: Path) -> None:
    write_json(path, trace.to_dict())


def _html(trace: Trace, path: Path) -> None:
    def row(kind: str, label: str, cells: list[str]) -> str:
        return f'<tr class="{kind}"><th>{html.escape(label)}</th>{"".join(cells)}</tr>'

    def plain(tokens: list[str]) -> list[str]:
        return [f"<td>{html.escape(visible(token))}</td>" for token in tokens]

    rows = [row("input", "token", plain([trace.token_at(p) for p in trace.positions.tolist()]))]
    for tap in reversed(range(len(trace.taps))):
        cells = [_html_cell(trace, at, tap) for at in range(len(trace.positions))]
        rows.append(row("layer", tap_label(trace.taps, tap), cells))
    followed = [trace.target_text(at) for at in range(len(trace.positions))]
    rows.append(row("target", "target", plain(followed)))
    with replacing(path) as partial:
        page = PAGE.format(title="lens", rows="\n".join(rows))
        partial.write_text(page, encoding="utf-8")


def _html_cell(trace: Trace, at: int, tap: int) -> str:
    ids, logprobs = trace.token_ids[at, tap].tolist(), trace.logprobs[at, tap].tolist()
    lines = [
        f"{visible(trace.text_of(token))}  {math.exp(logprob):.4f}"
        for token, logprob in zip(ids, logprobs, strict=True)
    ]
    lines.append(f"entropy {trace.entropy[at, tap]:.3f} nats")
    lines.append(f"KL to final {trace.kl_to_final[at, tap]:.3f} nats")
    if trace.targets[at] >= 0:
        lines.append(
            f"target: rank {trace.target_rank[at, tap]}, "
            f"probability {math.exp(trace.target_logprob[at, tap]):.4f}"
        )
    title = html.escape("\n".join(lines), quote=True)
    shade = f"background: rgba(34, 139, 94, {math.exp(logprobs[0]):.2f})"
    top = html.escape(visible(trace.text_of(ids[0])))
    return f'<td style="{shade}" title="{title}">{top}</td>'


def _png(trace: Trace, path: Path) -> None:
    require("matplotlib", "plot", str(path))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_positions, n_taps = len(trace.positions), len(trace.taps)
    width = min(n_positions, PNG_POSITIONS)
    figure = Figure(figsize=(2 + 0.8 * width, 1 + 0.32 * n_taps), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    probabilities = trace.logprobs[:, :, 0].exp()  # [T, P]
    image = axes.imshow(
        probabilities.T.numpy(), aspect="auto", origin="lower", cmap="Greens", vmin=0, vmax=1
    )
    axes.set_yticks(range(n_taps), [tap_label(trace.taps, tap) for tap in range(n_taps)])
    if n_positions <= PNG_POSITIONS:
        _png_texts(trace, axes, probabilities)
    else:
        axes.set_xlabel("position")
    figure.colorbar(image, label="probability")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _png_texts(trace: Trace, axes: Any, probabilities: Tensor) -> None:
    """Name each cell's likeliest token, and the token at each position."""

    def escaped(token: str) -> str:
        return visible(token).replace("$", r"\$")

    for at, tap in itertools.product(*map(range, probabilities.shape)):
        text = escaped(trace.text_of(int(trace.token_ids[at, tap, 0])))
        color = "white" if probabilities[at, tap] > 0.6 else "black"
        axes.text(at, tap, text, ha="center", va="center", fontsize=7, color=color)
    tokens = [escaped(trace.token_at(position)) for position in trace.positions.tolist()]
    axes.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right")


def _parquet(trace: Trace, path: Path) -> None:
    """One row per position, tap and winner; `place` counts the winners from 0."""
    require("pyarrow", "parquet", str(path))
    import pyarrow
    from pyarrow import parquet

    n_positions, n_taps, k = trace.token_ids.shape

    def per_tap(values: Sequence[object]) -> list[object]:
        return [value for value in values for _ in range(k)]

    def per_position(values: list[int]) -> list[object]:
        return [value for value in values for _ in range(n_taps * k)]

    ids = trace.token_ids.flatten().tolist()
    columns = {
        "position": per_position(trace.positions.tolist()),
        "layer": per_tap([tap.layer for tap in trace.taps] * n_positions),
        "point": per_tap([tap.point for tap in trace.taps] * n_positions),
        "place": list(range(k)) * (n_positions * n_taps),
        "token_id": ids,
        "token": [trace.text_of(token) for token in ids],
        "logprob": trace.logprobs.flatten().tolist(),
        "entropy": per_tap(trace.entropy.flatten().tolist()),
        "kl_to_final": per_tap(trace.kl_to_final.flatten().tolist()),
        "target": per_position(trace.targets.tolist()),
        "target_logprob": per_tap(trace.target_logprob.flatten().tolist()),
        "target_rank": per_tap(trace.target_rank.flatten().tolist()),
    }
    with replacing(path) as partial:
        parquet.write_table(pyarrow.table(columns), partial)

"""Where the metrics of a training go: a function, a file of JSON lines, or TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engine.files import check_writable
from ..tokenizer.paths import user_path
from .layer_sums import LayerMetrics

OnMetrics = Callable[[LayerMetrics], None]


def writer_of(to: OnMetrics | str | Path | Any) -> OnMetrics:
    """A function that writes metrics to a .jsonl file or to a TensorBoard writer; or `to` itself.

    Raises ValueError for anything else, and for a path that cannot be written.
    """
    if isinstance(to, str | Path):
        path = user_path(to)
        if path.suffix != ".jsonl":
            raise ValueError(f"{path}: metrics are written to .jsonl, a line of JSON each")
        check_writable(path)
        return lambda metrics: _append(path, metrics)
    if hasattr(to, "add_scalar"):
        return lambda metrics: _add_scalars(to, metrics)
    if not callable(to):
        raise ValueError(
            f"metrics go to a function, a path that ends in .jsonl or a TensorBoard writer, not "
            f"{type(to).__name__}"
        )
    return to


def _append(path: Path, metrics: LayerMetrics) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics.to_dict(), allow_nan=False) + "\n")


def _add_scalars(writer: Any, metrics: LayerMetrics) -> None:
    for name, value in asdict(metrics).items():
        if isinstance(value, float) and not math.isnan(value):
            writer.add_scalar(f"lens/{name}", value, metrics.step)
        elif isinstance(value, list) and name != "layers":
            for layer, number in zip(metrics.layers, value, strict=True):
                if not math.isnan(number):
                    writer.add_scalar(f"lens/{name}/layer {layer}", number, metrics.step)

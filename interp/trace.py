"""The trace of a lens: per position and tap, the likeliest tokens and how sure the model was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.files import require, write_json
from ..engine.lens_rows import LensRecord
from ..engine.record import record_width, unpack_rows
from ..engine.tap_names import tap_name
from ..model.points import Tap
from ..model.summary import TEXT_CHARACTERS, brief, counted, named
from ..tokenizer.json_file import read_object
from ..tokenizer.paths import user_path
from ..tokenizer.visible import cell
from .trace_fields import LARGEST_BYTES, read_fields, written_fields
from .trace_files import check_format, write_html, write_parquet, write_png
from .trace_grid import Cell, Grid, tap_labels


@dataclass
class Trace:
    """Lens of one text: T positions, P taps, k candidates. Tensors lie on the CPU.

    A position's prediction is about the token after it; `targets` holds the ids of target_logprob
    and target_rank, -1 (and NaN, -1 there) where there is none.
    """

    taps: tuple[Tap, ...]  # P (layer, point) pairs
    positions: Tensor  # [T] int64, absolute
    targets: Tensor  # [T] int64
    token_ids: Tensor  # [T, P, k] int64, best first
    logprobs: Tensor  # [T, P, k] float32, natural log, against the whole vocabulary
    entropy: Tensor  # [T, P] float32, nats
    target_logprob: Tensor  # [T, P] float32
    target_rank: Tensor  # [T, P] int64: how many ids beat the target
    kl_to_final: Tensor  # [T, P] float32, nats: KL(final layer ‖ this layer)
    input_ids: list[int] = field(default_factory=list)  # the whole text, generated part included
    names: dict[int, str] = field(default_factory=dict)  # id -> text, for every id above
    prompt: str | None = None  # as it was given, where it was a text
    text: str | None = None  # that was generated, up to the first stop text

    def __repr__(self) -> str:
        ends = dict.fromkeys(map(tap_name, (*self.taps[:1], *self.taps[-1:])))
        start = self.prompt or "".join(map(self.text_of, self.input_ids[:TEXT_CHARACTERS]))
        parts = [
            counted(len(self.positions), "position"),
            counted(len(self.taps), "tap"),
            " to ".join(ends),
            f"k {self.token_ids.shape[-1]}",
        ]
        return named(self, *parts, *([brief(start)] if start else []))

    @classmethod
    def empty(cls, taps: tuple[Tap, ...], top_k: int) -> Trace:
        """A trace of no position."""
        rows = torch.empty(0, len(taps), record_width(top_k), dtype=torch.int32)
        return cls.from_rows(taps, [], [], rows)

    @classmethod
    def from_rows(
        cls, taps: tuple[Tap, ...], positions: list[int], targets: list[int], rows: Tensor
    ) -> Trace:
        """A trace of packed rows [T, P, width] int32 (see engine/record.py)."""
        return cls(
            taps=taps,
            positions=torch.tensor(positions, dtype=torch.int64),
            targets=torch.tensor(targets, dtype=torch.int64),
            **vars(unpack_rows(rows)),
        )

    @classmethod
    def from_record(cls, record: LensRecord) -> Trace:
        """A trace of all that a lens kept of one text."""
        rows = record.rows()
        if rows is None:
            return cls.empty(record.taps, record.spec.top_k)
        return cls.from_rows(record.taps, list(record.positions), list(record.targets), rows)

    def name_tokens(self, text_of: Callable[[int], str]) -> None:
        """Fill `names` with text_of(id), such as a tokenizer's `token_text`."""
        ids = {*self.input_ids, *self.token_ids.unique().tolist(), *self.targets.tolist()} - {-1}
        self.names = {token: text_of(token) for token in sorted(ids)}

    def text_of(self, token_id: int) -> str:
        """The text of a token, or its id in angle brackets where it has no name."""
        return self.names.get(token_id, f"<{token_id}>")

    def token_at(self, position: int) -> str:
        """Text of the token at an absolute position, empty where the whole text is not known."""
        return self.text_of(self.input_ids[position]) if self.input_ids else ""

    def target_text(self, index: int) -> str:
        """Text of the target of the index-th traced position, empty where there is none."""
        target = int(self.targets[index])
        return self.text_of(target) if target >= 0 else ""

    def grid(self, indices: Iterable[int] | None = None) -> Grid:
        """The cells to show, of all traced positions or of those with the given indices in T."""
        chosen = list(range(len(self.positions)) if indices is None else indices)
        return Grid(
            labels=tap_labels(self.taps),
            tokens=[cell(self.token_at(int(self.positions[index]))) for index in chosen],
            targets=[cell(self.target_text(index)) for index in chosen],
            cells=[
                [self._cell(index, column) for index in chosen] for column in range(len(self.taps))
            ],
        )

    def _cell(self, index: int, column: int) -> Cell:
        ids, logprobs = (x[index, column].tolist() for x in (self.token_ids, self.logprobs))
        target = None
        if self.targets[index] >= 0:
            probability = math.exp(self.target_logprob[index, column])
            target = int(self.target_rank[index, column]), probability
        return Cell(
            candidates=[
                (cell(self.text_of(token)), math.exp(logprob))
                for token, logprob in zip(ids, logprobs, strict=True)
            ],
            entropy=float(self.entropy[index, column]),
            kl_to_final=float(self.kl_to_final[index, column]),
            target=target,
            is_hit=ids[0] == int(self.targets[index]),
        )

    def columns(self) -> dict[str, list[Any]]:
        """A table of T · P · k rows, one per position, tap and candidate.

        `candidate` counts from 0, the likeliest; the values of a tap or position are repeated.
        """
        n_positions, n_taps, k = self.token_ids.shape
        ids = self.token_ids.flatten().tolist()
        taps = self.taps * n_positions
        return {
            "position": _repeated(self.positions.tolist(), n_taps * k),
            "layer": _repeated([tap.layer for tap in taps], k),
            "point": _repeated([tap.point for tap in taps], k),
            "candidate": list(range(k)) * (n_positions * n_taps),
            "token_id": ids,
            "token": [self.text_of(token) for token in ids],
            "logprob": self.logprobs.flatten().tolist(),
            "entropy": _repeated(self.entropy.flatten().tolist(), k),
            "kl_to_final": _repeated(self.kl_to_final.flatten().tolist(), k),
            "target": _repeated(self.targets.tolist(), n_taps * k),
            "target_logprob": _repeated(self.target_logprob.flatten().tolist(), k),
            "target_rank": _repeated(self.target_rank.flatten().tolist(), k),
        }

    def to_pandas(self) -> Any:
        """`columns` as a pandas.DataFrame. Raises ValueError where pandas is missing."""
        require("pandas", "pandas", "to_pandas")
        import pandas

        return pandas.DataFrame(self.columns())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; NaN becomes None."""
        return written_fields(vars(self))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Trace:
        """The inverse of `to_dict`. Raises ValueError naming a field that no trace has so."""
        try:
            return cls(**read_fields(content))
        except ValueError as error:
            raise ValueError(f"this is no trace: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write to .json, .html, .png or .parquet, by the ending, or nothing at all.

        Raises ValueError for another ending, where the extra package it needs is missing, and for
        a path that nothing can be written to; OSError where writing fails, as on a full disk.
        """
        path = Path(path)
        check_format(path)
        if path.suffix == ".json":
            write_json(path, self.to_dict())
        elif path.suffix == ".parquet":
            write_parquet(self.columns(), path)
        elif path.suffix == ".html":
            write_html(self.grid(), path)
        else:
            write_png(self.grid(), path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a .json file that `save`, or --out or --json of a command, wrote.

        Raises ValueError naming a file that is not one.
        """
        path = user_path(path)
        if path.suffix != ".json":
            raise ValueError(
                f"{path}: a trace is read from .json; the other formats are to look at"
            )
        content = read_object(path, "a trace", LARGEST_BYTES)
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _repeated(values: Iterable[Any], times: int) -> list[Any]:
    return list(itertools.chain.from_iterable(itertools.repeat(x, times) for x in values))

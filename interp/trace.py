"""What a lens saw: per position and tap, the winners and how sure the model was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.record import unpack
from ..model.points import Tap


@dataclass
class Trace:
    """Lens of one text: T positions, P taps, k winners. Tensors lie on the CPU.

    A position's prediction is about the token after it; `targets` is the id that
    target_logprob and target_rank speak of, -1 (and NaN, -1 there) where there is none.
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

    @classmethod
    def empty(cls, taps: tuple[Tap, ...], top_k: int) -> Trace:
        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32)

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64)

        n = len(taps)
        return cls(
            taps=taps,
            positions=ints(0),
            targets=ints(0),
            token_ids=ints(0, n, top_k),
            logprobs=floats(0, n, top_k),
            entropy=floats(0, n),
            target_logprob=floats(0, n),
            target_rank=ints(0, n),
            kl_to_final=floats(0, n),
        )

    @classmethod
    def of_rows(
        cls, taps: tuple[Tap, ...], positions: list[int], targets: list[int], rows: Tensor
    ) -> Trace:
        """From packed rows [T, P, width] (see model/reading.py)."""
        return cls(
            taps=taps,
            positions=torch.tensor(positions, dtype=torch.int64),
            targets=torch.tensor(targets, dtype=torch.int64),
            **vars(unpack(rows)),
        )

    def name_tokens(self, text_of: Callable[[int], str]) -> None:
        """Fill `names` with text_of(id), such as a tokenizer's `token_text`."""
        ids = {*self.input_ids, *self.token_ids.unique().tolist(), *self.targets.tolist()} - {-1}
        self.names = {token: text_of(token) for token in sorted(ids)}

    def text_of(self, token_id: int) -> str:
        return self.names.get(token_id, f"<{token_id}>")

    def token_at(self, position: int) -> str:
        """Text of the token that stands at an absolute position."""
        return self.text_of(self.input_ids[position])

    def target_text(self, at: int) -> str:
        """Text of the target of the at-th traced position, empty where there is none."""
        target = int(self.targets[at])
        return self.text_of(target) if target >= 0 else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; NaN becomes None."""
        content: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                value = _without_nan(value.tolist())
            content[item.name] = value
        content["taps"] = [list(tap) for tap in self.taps]
        content["names"] = {str(token): text for token, text in self.names.items()}
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Trace:
        """The inverse of `to_dict`."""
        taps = tuple(Tap(layer, point) for layer, point in content["taps"])
        top_k = len(content["token_ids"][0][0]) if content["token_ids"] else 0
        like = cls.empty(taps, top_k)
        fields = dict(content)
        for name, value in vars(like).items():
            if isinstance(value, Tensor):
                numbers = torch.tensor(_with_nan(content[name]), dtype=value.dtype)
                fields[name] = numbers.reshape(-1, *value.shape[1:])
        fields["taps"] = taps
        fields["names"] = {int(token): text for token, text in content["names"].items()}
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        """Write to .json, .html, .png or .parquet, by the ending, or nothing at all.

        Raises ValueError for another ending, or where the extra package it needs is missing.
        """
        from .trace_files import save_trace

        save_trace(self, Path(path))


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return float("nan") if value is None else value

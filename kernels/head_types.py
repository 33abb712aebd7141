"""Arguments and results of the head: the options for its rows, and the statistics of a slice.

Legend: R rows, Vs ids of the slice (global ids first_id ...), k candidates kept per row, B sampled
rows, n candidates kept for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """Per row: the id whose rank is wanted, -1 for none, and its logit.

    The logit comes from `target_logits`. Where that rounds differently from the streamed logits,
    ids within `slack` of it count as tied with it, so that equal rows of W do tie; where it has
    their bits, the slack is 0.
    """

    ids: Tensor  # [R] int64
    logits: Tensor  # [R] float32
    slack: Tensor  # [R] float32

    def rows(self, rows: slice | Tensor) -> Target:
        return Target(self.ids[rows], self.logits[rows], self.slack[rows])


@dataclass(frozen=True)
class Noise:
    """One row of each of the first B requests is sampled: keys are z + Gumbel(seed, step, id).

    It is the request's row number `sample_row`; with one row per request, the first B rows are
    sampled.
    """

    seed: Tensor  # [B] int64
    step: Tensor  # [B] int64
    n_best: int = 1
    sample_row: int = 0

    def requests(self, requests: slice) -> Noise:
        return replace(self, seed=self.seed[requests], step=self.step[requests])

    def sampled(self, rows: Tensor, rows_per_request: int) -> Tensor:
        """The sampled rows among rows [R, ...], a view [B, ...]."""
        return rows[self.sample_row :: rows_per_request][: self.seed.shape[0]]


@dataclass(frozen=True)
class HeadOptions:
    """The options of `head_stats`, whose docstring describes them."""

    k: int
    first_id: int = 0
    scale: Tensor | None = None  # [R] float32
    target: Target | None = None
    rows_per_request: int = 1
    noise: Noise | None = None

    def check(self, x: Tensor, weight: Tensor) -> None:
        """Raise ValueError for k below 1, shapes that do not fit, or requests that are cut."""
        if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
            raise ValueError(f"rows {list(x.shape)} and weight {list(weight.shape)} do not fit")
        if self.k < 1:
            raise ValueError(f"k of {self.k} is below 1")
        if x.shape[0] % self.rows_per_request:
            raise ValueError(
                f"{x.shape[0]} rows are not whole requests of {self.rows_per_request} rows"
            )
        if self.noise is not None:
            self._check_noise(self.noise, x.shape[0] // self.rows_per_request)

    def _check_noise(self, noise: Noise, n_requests: int) -> None:
        if not 0 <= noise.sample_row < self.rows_per_request:
            raise ValueError(
                f"sample_row {noise.sample_row} is outside requests of {self.rows_per_request} rows"
            )
        if noise.seed.shape[0] > n_requests:
            raise ValueError(f"{noise.seed.shape[0]} seeds for {n_requests} requests")

    def without_noise(self, rows: slice | Tensor = slice(None)) -> HeadOptions:
        """The same options for some of the rows, none of which is sampled."""
        return replace(
            self,
            scale=None if self.scale is None else self.scale[rows],
            target=None if self.target is None else self.target.rows(rows),
            noise=None,
        )

    def for_requests(self, requests: slice) -> HeadOptions:
        """The same options for the rows of some requests."""
        size = self.rows_per_request
        options = self.without_noise(slice(requests.start * size, requests.stop * size))
        if self.noise is None:
            return options
        return replace(options, noise=self.noise.requests(requests))


@dataclass(frozen=True)
class RowStats:
    """Statistics of R rows over one slice, float32 or int64; `head_stats_reference` defines them.

    Across slices, `target_rank` and `target_logit` are parts of sums.
    """

    token_ids: Tensor  # [R, k] int64, best first; -1 where the slice has fewer than k ids
    logits: Tensor  # [R, k]
    max: Tensor  # [R]
    sum_exp: Tensor  # [R]
    sum_dev: Tensor  # [R]
    cross: Tensor  # [R]
    target_logit: Tensor  # [R]
    target_rank: Tensor  # [R] int64

    @classmethod
    def empty(cls, n_rows: int, k: int, device: torch.device) -> RowStats:
        """The statistics of a slice without ids."""
        return cls(
            token_ids=_ids((n_rows, k), -1, device),
            logits=_floats((n_rows, k), -torch.inf, device),
            max=_floats((n_rows,), -torch.inf, device),
            sum_exp=_floats((n_rows,), 0, device),
            sum_dev=_floats((n_rows,), 0, device),
            cross=_floats((n_rows,), 0, device),
            target_logit=_floats((n_rows,), 0, device),
            target_rank=_ids((n_rows,), 0, device),
        )

    def rows(self, rows: slice | Tensor) -> RowStats:
        """The statistics of some rows; views for a slice."""
        return RowStats(**{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True)
class SampleStats:
    """The n best keys z + Gumbel of each of B sampled rows over one slice."""

    token_ids: Tensor  # [B, n] int64, best key first; -1 where the slice has fewer than n ids
    logits: Tensor  # [B, n]
    keys: Tensor  # [B, n]

    @classmethod
    def empty(cls, noise: Noise, device: torch.device) -> SampleStats:
        """The samples of a slice without ids."""
        shape = (noise.seed.shape[0], noise.n_best)
        return cls(
            token_ids=_ids(shape, -1, device),
            logits=_floats(shape, -torch.inf, device),
            keys=_floats(shape, -torch.inf, device),
        )

    @classmethod
    def joined(cls, parts: Sequence[SampleStats]) -> SampleStats:
        """The parts, which follow each other, joined into one."""
        names = [item.name for item in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def requests(self, requests: slice) -> SampleStats:
        """The samples of some requests, as views."""
        return SampleStats(**{name: value[requests] for name, value in vars(self).items()})


N_ROW_TENSORS = len(fields(RowStats))


@dataclass(frozen=True)
class HeadStats:
    """Statistics of rows, and of their samples where noise is given, over one slice."""

    rows: RowStats
    samples: SampleStats | None = None

    @classmethod
    def empty(cls, n_rows: int, options: HeadOptions, device: torch.device) -> HeadStats:
        """The statistics of a slice without ids."""
        noise = options.noise
        return cls(
            RowStats.empty(n_rows, options.k, device),
            None if noise is None else SampleStats.empty(noise, device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name, such as "rows.logits"."""
        parts = {"rows": self.rows} | ({} if self.samples is None else {"samples": self.samples})
        return {f"{part}.{n}": v for part, stats in parts.items() for n, v in vars(stats).items()}

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> HeadStats:
        """The inverse of `tensors`, from its values."""
        samples = tensors[N_ROW_TENSORS:]
        return cls(RowStats(*tensors[:N_ROW_TENSORS]), SampleStats(*samples) if samples else None)


def _floats(shape: tuple[int, ...], value: float, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=torch.float32, device=device)


def _ids(shape: tuple[int, ...], value: int, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=torch.int64, device=device)

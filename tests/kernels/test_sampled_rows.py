"""The rows that are sampled from, and their noise: against keys from float64 logits, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import LENS
from torch import Tensor

from shardlens.kernels import (
    HeadStats,
    Noise,
    gumbel_reference,
    head_stats,
    head_stats_reference,
)

FIRST_ID, N_BEST = 77, 3


def problem(rows: int, n_samples: int, sample_row: int, device: torch.device) -> Any:
    x, weight = torch.randn(rows, 32), torch.randn(150, 32) / 4
    seeds = torch.arange(n_samples) * 2**40 + 11
    noise = Noise(seeds.to(device), torch.arange(n_samples, device=device) + 7, N_BEST, sample_row)
    return x.to(device), weight.to(device), (torch.rand(rows) + 0.5).to(device), noise


def exact_keys(x: Tensor, weight: Tensor, scale: Tensor, noise: Noise, size: int) -> Any:
    """Keys, ids and logits [B, N_BEST], each row looked up by its number."""
    best_keys, ids, logits = [], [], []
    every_id = torch.arange(len(weight), device=x.device) + FIRST_ID
    for b, (seed, step) in enumerate(zip(noise.seed, noise.step, strict=True)):
        row = b * size + noise.sample_row
        z = (weight.double() @ x[row].double()) * scale[row]
        keys = z + gumbel_reference(seed, step, every_id)
        best = keys.topk(N_BEST)
        best_keys.append(best.values)
        ids.append(best.indices + FIRST_ID)
        logits.append(z[best.indices])
    return torch.stack(best_keys), torch.stack(ids), torch.stack(logits)


def check(stats: HeadStats, exact: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, ids, logits = exact
    assert stats.samples is not None
    assert torch.equal(stats.samples.token_ids, ids)
    assert (stats.samples.keys - keys).abs().max() <= LENS
    assert (stats.samples.logits - logits).abs().max() <= LENS


@pytest.mark.parametrize("n_samples", [1, 4])
@pytest.mark.parametrize("size, sample_row", [(1, 0), (5, 0), (5, 2), (5, 4)])
def test_one_row_of_each_of_the_first_requests(
    size: int, sample_row: int, n_samples: int, device: torch.device, either: str
) -> None:
    """4 requests, all or fewer of which are sampled; whatever else is asked of the rows."""
    x, weight, scale, noise = problem(4 * size, n_samples, sample_row, device)
    options: dict[str, Any] = dict(first_id=FIRST_ID, scale=scale, rows_per_request=size)
    stats = head_stats(x, weight, k=2, noise=noise, **options)
    check(stats, exact_keys(x, weight, scale, noise, size))
    assert stats.samples is not None
    for row in set(range(size)) - {sample_row}:
        other = Noise(noise.seed, noise.step, N_BEST, row)
        elsewhere = head_stats_reference(x, weight, k=2, noise=other, **options).samples
        assert elsewhere is not None
        assert not torch.equal(elsewhere.token_ids, stats.samples.token_ids)
    without = head_stats(x, weight, k=2, **options)
    assert without.samples is None
    for name, value in vars(without.rows).items():
        assert torch.equal(getattr(stats.rows, name), value), name


@pytest.mark.parametrize("rows, size, sample_row", [(140, 70, 33), (133, 133, 132)])
def test_more_rows_than_a_tile(
    rows: int, size: int, sample_row: int, device: torch.device, either: str
) -> None:
    """Sampled rows are launched apart, also where a request is longer than a tile."""
    x, weight, scale, noise = problem(rows, rows // size, sample_row, device)
    options: dict[str, Any] = dict(first_id=FIRST_ID, scale=scale, rows_per_request=size)
    stats = head_stats(x, weight, k=2, noise=noise, **options)
    check(stats, exact_keys(x, weight, scale, noise, size))


@pytest.mark.parametrize("row_block", [1, 3, 7, 100])
def test_blocks_of_rows_hold_whole_requests(row_block: int) -> None:
    """3 of 5 requests are sampled: all, some and none of a block's requests."""
    x, weight, scale, noise = problem(15, 3, 1, torch.device("cpu"))
    stats = head_stats_reference(
        x,
        weight,
        k=2,
        first_id=FIRST_ID,
        scale=scale,
        noise=noise,
        rows_per_request=3,
        row_block=row_block,
        vocab_block=64,
    )
    check(stats, exact_keys(x, weight, scale, noise, 3))


def test_refusals(device: torch.device, either: str) -> None:
    x, weight, _, _ = problem(6, 1, 0, device)
    seeds = torch.zeros(3, dtype=torch.int64, device=device)
    for row in (-1, 2):
        noise = Noise(seeds, seeds, sample_row=row)
        with pytest.raises(ValueError, match=f"sample_row {row} .* requests of 2 rows"):
            head_stats(x, weight, k=1, rows_per_request=2, noise=noise)
    with pytest.raises(ValueError, match="3 seeds for 2 requests"):
        head_stats(x, weight, k=1, rows_per_request=3, noise=Noise(seeds, seeds))

"""Which rows are sampled from, and with what: against keys from float64 logits, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import LENS
from torch import Tensor

from shardlens.kernels.gumbel import gumbel_reference
from shardlens.kernels.head_stats import head_stats
from shardlens.kernels.head_stats_reference import HeadStats, Noise, head_stats_reference

FIRST_ID, N_BEST = 77, 3


def problem(rows: int, n_keyed: int, place: int, device: torch.device) -> Any:
    x, weight = torch.randn(rows, 32), torch.randn(150, 32) / 4
    seeds = torch.arange(n_keyed) * 2**40 + 11
    noise = Noise(seeds.to(device), torch.arange(n_keyed, device=device) + 7, N_BEST, place)
    return x.to(device), weight.to(device), (torch.rand(rows) + 0.5).to(device), noise


def exact_keys(x: Tensor, weight: Tensor, scale: Tensor, noise: Noise, group: int) -> Any:
    """Key values, ids and logits [B, N_BEST], each row looked up by its number."""
    values, ids, logits = [], [], []
    every_id = torch.arange(len(weight), device=x.device) + FIRST_ID
    for b, (seed, step) in enumerate(zip(noise.seed, noise.step, strict=True)):
        row = b * group + noise.place
        z = (weight.double() @ x[row].double()) * scale[row]
        keys = z + gumbel_reference(seed, step, every_id)
        best = keys.topk(N_BEST)
        values.append(best.values)
        ids.append(best.indices + FIRST_ID)
        logits.append(z[best.indices])
    return torch.stack(values), torch.stack(ids), torch.stack(logits)


def check(stats: HeadStats, exact: tuple[Tensor, Tensor, Tensor]) -> None:
    values, ids, logits = exact
    assert torch.equal(stats.key_ids, ids)
    assert (stats.key_values - values).abs().max() <= LENS
    assert (stats.key_logits - logits).abs().max() <= LENS


@pytest.mark.parametrize("n_keyed", [1, 4])
@pytest.mark.parametrize("group, place", [(1, 0), (5, 0), (5, 2), (5, 4)])
def test_one_row_of_each_of_the_first_groups(
    group: int, place: int, n_keyed: int, device: torch.device, either: str
) -> None:
    """4 groups, all or fewer of which are sampled; whatever else is asked of the rows."""
    x, weight, scale, noise = problem(4 * group, n_keyed, place, device)
    options: dict[str, Any] = dict(first_id=FIRST_ID, scale=scale, group_size=group)
    stats = head_stats(x, weight, k=2, noise=noise, **options)
    check(stats, exact_keys(x, weight, scale, noise, group))
    others = [Noise(noise.seed, noise.step, N_BEST, p) for p in range(group) if p != place]
    for other in others:
        elsewhere = head_stats_reference(x, weight, k=2, noise=other, **options)
        assert not torch.equal(elsewhere.key_ids, stats.key_ids)
    without = head_stats(x, weight, k=2, **options)
    for name, value in vars(without).items():
        assert name.startswith("key_") or torch.equal(getattr(stats, name), value), name


@pytest.mark.parametrize("rows, group, place", [(140, 70, 33), (133, 133, 132)])
def test_more_rows_than_a_tile(
    rows: int, group: int, place: int, device: torch.device, either: str
) -> None:
    """Sampled rows are launched apart, also where a group is longer than a tile."""
    x, weight, scale, noise = problem(rows, rows // group, place, device)
    options: dict[str, Any] = dict(first_id=FIRST_ID, scale=scale, group_size=group)
    stats = head_stats(x, weight, k=2, noise=noise, **options)
    check(stats, exact_keys(x, weight, scale, noise, group))


@pytest.mark.parametrize("row_block", [1, 3, 7, 100])
def test_blocks_of_rows_hold_whole_groups(row_block: int) -> None:
    """3 of 5 groups are sampled: all, some and none of a block's groups."""
    x, weight, scale, noise = problem(15, 3, 1, torch.device("cpu"))
    stats = head_stats_reference(
        x,
        weight,
        k=2,
        first_id=FIRST_ID,
        scale=scale,
        noise=noise,
        group_size=3,
        row_block=row_block,
        vocab_block=64,
    )
    check(stats, exact_keys(x, weight, scale, noise, 3))


def test_refusals(device: torch.device, either: str) -> None:
    x, weight, _, _ = problem(6, 1, 0, device)
    seeds = torch.zeros(3, dtype=torch.int64, device=device)
    for place in (-1, 2):
        with pytest.raises(ValueError, match=f"place {place} .* groups of 2"):
            head_stats(x, weight, k=1, group_size=2, noise=Noise(seeds, seeds, place=place))
    with pytest.raises(ValueError, match="3 seeds for 2 groups"):
        head_stats(x, weight, k=1, group_size=3, noise=Noise(seeds, seeds))

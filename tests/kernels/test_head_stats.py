"""Streamed head statistics against float64, at odd sizes, with ties, empties and extremes."""

from __future__ import annotations

import pytest
import torch
from tolerances import LENS
from torch import Tensor

from shardlens.kernels import (
    HeadStats,
    Noise,
    RowStats,
    Target,
    head_stats_reference,
    mass_above_reference,
    rmsnorm_reference,
    target_logits_reference,
)
from shardlens.kernels.head_stats_reference import float_logits


def head_of(x: Tensor, weight: Tensor, **options: object) -> HeadStats:
    return head_stats_reference(x, weight, **({"k": 3, "vocab_block": 64} | options))  # type: ignore[arg-type]


def stats_of(x: Tensor, weight: Tensor, **options: object) -> RowStats:
    return head_of(x, weight, **options).rows


@pytest.mark.parametrize("rows", [0, 1, 7, 123])
@pytest.mark.parametrize("vocab, d", [(509, 96), (64, 507), (2, 16), (1000, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(rows: int, vocab: int, d: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, d).to(dtype), (torch.randn(vocab, d) / d**0.5).to(dtype)
    k = min(5, vocab)
    stats = stats_of(x, weight, k=k, first_id=1000)
    z = x.double() @ weight.double().T
    order = torch.sort(z, dim=-1, descending=True, stable=True)
    assert torch.equal(stats.token_ids - 1000, order.indices[:, :k])
    torch.testing.assert_close(stats.logits.double(), order.values[:, :k], rtol=0, atol=LENS)
    dev = z - z.amax(-1, keepdim=True) if rows else z
    torch.testing.assert_close(stats.sum_exp.double(), dev.exp().sum(-1), rtol=LENS, atol=0)
    expected = (dev.exp() * dev).sum(-1)
    torch.testing.assert_close(stats.sum_dev.double(), expected, rtol=LENS, atol=LENS)


def test_k_beyond_the_slice_and_empty_slices() -> None:
    """A rank may hold fewer ids than k, or none: its slots stay (-inf, -1), its sums 0."""
    x = torch.randn(4, 8)
    few = stats_of(x, torch.randn(2, 8), k=5)
    assert (few.token_ids[:, 2:] == -1).all() and few.logits[:, 2:].isneginf().all()
    none = stats_of(x, torch.randn(0, 8), k=5, rows_per_request=2)
    assert none.max.isneginf().all() and (none.token_ids == -1).all()
    assert not (none.sum_exp.any() or none.sum_dev.any() or none.cross.any())
    assert (target_logits_reference(x, torch.randn(0, 8), torch.zeros(4).long()) == 0).all()


@pytest.mark.parametrize("vocab_block", [1, 7, 64, 4096])
def test_ties_within_and_across_blocks(vocab_block: int) -> None:
    """Only three distinct logits over 300 ids: the top-k are the lowest ids of the best value."""
    values = torch.arange(300) % 3
    x, weight = torch.ones(2, 1), values[:, None].float()
    stats = stats_of(x, weight, k=10, vocab_block=vocab_block)
    assert stats.token_ids.tolist() == [[*range(2, 32, 3)]] * 2


def test_everything_ties() -> None:
    stats = stats_of(torch.ones(3, 4), torch.ones(150, 4), k=6)
    assert stats.token_ids.tolist() == [list(range(6))] * 3
    assert torch.equal(stats.sum_exp, torch.full((3,), 150.0))
    assert (stats.sum_dev == 0).all()


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_extremes(scale: float) -> None:
    """Logits of ±1e4 and of nearly nothing give finite sums and the right top-k."""
    x, weight = torch.randn(5, 16), torch.randn(300, 16) * scale
    stats = stats_of(x, weight, rows_per_request=5)
    z = x.double() @ weight.double().T
    assert torch.equal(stats.token_ids[:, 0], z.argmax(-1))
    for value in (stats.sum_exp, stats.sum_dev, stats.cross):
        assert value.isfinite().all()
    assert (stats.sum_exp >= 1).all()


def test_non_contiguous_inputs() -> None:
    wide, tall = torch.randn(9, 64), torch.randn(64, 300)
    x, weight = wide[::2, ::4], tall.T[:, ::4]
    plain = stats_of(x.contiguous(), weight.contiguous())
    for name, value in vars(stats_of(x, weight)).items():
        torch.testing.assert_close(value, getattr(plain, name))


def test_counts_around_the_target() -> None:
    """Rank by hand: larger logits, and equal ones with a lower id."""
    x, weight = torch.ones(1, 1), torch.tensor([[2.0], [5.0], [2.0], [7.0], [2.0]])
    for target, rank in ((3, 0), (1, 1), (0, 2), (2, 3), (4, 4)):
        ids = torch.tensor([target])
        logit, slack = target_logits_reference(x, weight, ids).unbind(-1)
        stats = stats_of(x, weight, target=Target(ids, logit, slack))
        assert stats.target_rank.tolist() == [rank]


def test_keys_are_logits_plus_noise() -> None:
    """The best keys carry their ids and logits, through any order of blocks."""
    x, weight = torch.randn(6, 16), torch.randn(300, 16)
    noise = Noise(torch.arange(6), torch.arange(6) * 7, n_best=20)
    small, large = (
        head_of(x, weight, noise=noise, vocab_block=size).samples for size in (11, 1000)
    )
    assert small is not None and large is not None
    assert torch.equal(small.token_ids, large.token_ids)
    z = float_logits(x, weight)
    torch.testing.assert_close(small.logits, z.gather(1, small.token_ids))
    assert (small.keys.diff(dim=-1) <= 0).all()
    assert all(len(set(row)) == 20 for row in small.token_ids.tolist())


def test_mass_above() -> None:
    x, weight = torch.randn(3, 8), torch.randn(200, 8)
    scale = torch.tensor([1.0, 0.5, 2.0])
    z = (x @ weight.T) * scale[:, None]
    ids = torch.tensor([[0, 199], [5, 6], [100, 7]])
    logits = z.gather(1, ids)
    mass = mass_above_reference(
        x,
        weight,
        scale=scale,
        logits=logits,
        token_ids=ids,
        logsumexp=z.logsumexp(-1),
        vocab_block=33,
    )
    probabilities = z.double().softmax(-1)
    for row in range(3):
        for candidate in range(2):
            expected = probabilities[row][z[row] > logits[row, candidate]].sum()
            assert abs(mass[row, candidate] - expected) <= LENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_error_is_that_of_its_dtype(dtype: torch.dtype) -> None:
    """To float64, no worse than casting the exact norm, weight multiplied after the cast."""
    x, weight = torch.randn(7, 507).to(dtype) * 30, torch.randn(507).to(dtype)
    x64 = x.double()
    exact = x64 / (x64.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    best = weight * exact.to(dtype)
    truth = weight.double() * exact
    error = (rmsnorm_reference(x, weight, 1e-5).double() - truth).abs().max()
    assert error <= (best.double() - truth).abs().max() * 1.01 + 1e-6


def exact_products(rows: int, n_ids: int) -> tuple[Tensor, Tensor]:
    """Multiples of 1/64 whose products float32 holds exactly, in whatever order they are added."""
    x, weight = (torch.randint(-16, 17, (n, 8)) / 8 for n in (rows, n_ids))
    return x, weight


@pytest.mark.parametrize("n_ids", [300, 1024, 20_003])
def test_sums_do_not_depend_on_the_other_rows(n_ids: int) -> None:
    """To the bit: the rows decide the blocks of ids, but not how a row is summed."""
    x, weight = exact_products(600, n_ids)
    whole = head_stats_reference(x, weight, k=3, rows_per_request=2).rows
    for n_rows in (2, 6, 32, 34, 100, 512):
        part = head_stats_reference(x[:n_rows], weight, k=3, rows_per_request=2).rows
        for name, value in vars(part).items():
            assert torch.equal(value, getattr(whole, name)[:n_rows]), (n_rows, name)
    # blocks that are no whole spans show that the order of sums matters
    cut = head_stats_reference(x, weight, k=3, rows_per_request=2, vocab_block=200).rows
    for name in ("sum_exp", "sum_dev", "cross"):
        assert not torch.equal(getattr(cut, name), getattr(whole, name)), name


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("n_ids", [2047, 4099])
def test_top_k_found_by_its_spans(k: int, n_ids: int) -> None:
    """Enough ids that spans are looked at first, with so few values that most candidates tie."""
    generator = torch.Generator().manual_seed(k)
    x = torch.eye(6)
    values = torch.randint(0, 3, (n_ids, 6), generator=generator).float()
    values[:, 3] = 0  # all tie
    values[-1, 4] = 9  # the best lies beyond the last whole span
    stats = head_stats_reference(x, values, k=k).rows
    order = values.T.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(stats.token_ids, order.indices[:, :k])
    assert torch.equal(stats.logits, order.values[:, :k])
    assert stats.token_ids[4, 0] == n_ids - 1 and stats.token_ids[3].tolist() == list(range(k))

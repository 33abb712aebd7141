"""Streamed head statistics against float64, at odd sizes, with ties, empties and extremes."""

from __future__ import annotations

import pytest
import torch
from tolerances import LENS
from torch import Tensor

from shardlens.kernels.head_stats_reference import (
    HeadStats,
    Noise,
    Target,
    float_logits,
    head_stats_reference,
    mass_above_reference,
)
from shardlens.kernels.rmsnorm_steer import rmsnorm_reference
from shardlens.kernels.target_logits import target_logits_reference


def stats_of(x: Tensor, weight: Tensor, **options: object) -> HeadStats:
    return head_stats_reference(x, weight, **({"k": 3, "vocab_block": 64} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [0, 1, 7, 123])
@pytest.mark.parametrize("vocab, d", [(509, 96), (64, 507), (2, 16), (1000, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(rows: int, vocab: int, d: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, d).to(dtype), (torch.randn(vocab, d) / d**0.5).to(dtype)
    k = min(5, vocab)
    stats = stats_of(x, weight, k=k, first_id=1000)
    z = x.double() @ weight.double().T
    order = torch.sort(z, dim=-1, descending=True, stable=True)
    assert torch.equal(stats.ids - 1000, order.indices[:, :k])
    torch.testing.assert_close(stats.values.double(), order.values[:, :k], rtol=0, atol=LENS)
    dev = z - z.amax(-1, keepdim=True) if rows else z
    torch.testing.assert_close(stats.sum_exp.double(), dev.exp().sum(-1), rtol=LENS, atol=0)
    expected = (dev.exp() * dev).sum(-1)
    torch.testing.assert_close(stats.sum_dev.double(), expected, rtol=LENS, atol=LENS)


def test_k_beyond_the_slice_and_empty_slices() -> None:
    """A rank may hold fewer ids than k, or none: its places stay (-inf, -1), its sums 0."""
    x = torch.randn(4, 8)
    few = stats_of(x, torch.randn(2, 8), k=5)
    assert (few.ids[:, 2:] == -1).all() and few.values[:, 2:].isneginf().all()
    none = stats_of(x, torch.randn(0, 8), k=5, group_size=2)
    assert none.max.isneginf().all() and (none.ids == -1).all()
    assert not (none.sum_exp.any() or none.sum_dev.any() or none.cross.any())
    assert (target_logits_reference(x, torch.randn(0, 8), torch.zeros(4).long()) == 0).all()


@pytest.mark.parametrize("vocab_block", [1, 7, 64, 4096])
def test_ties_within_and_across_blocks(vocab_block: int) -> None:
    """Only three distinct logits over 300 ids: winners are the lowest ids of the best level."""
    levels = torch.arange(300) % 3
    x, weight = torch.ones(2, 1), levels[:, None].float()
    stats = stats_of(x, weight, k=10, vocab_block=vocab_block)
    assert stats.ids.tolist() == [[*range(2, 32, 3)]] * 2


def test_everything_ties() -> None:
    stats = stats_of(torch.ones(3, 4), torch.ones(150, 4), k=6)
    assert stats.ids.tolist() == [list(range(6))] * 3
    assert torch.equal(stats.sum_exp, torch.full((3,), 150.0))
    assert (stats.sum_dev == 0).all()


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_extremes(scale: float) -> None:
    """Logits of ±1e4 and of nearly nothing give finite sums and the right winners."""
    x, weight = torch.randn(5, 16), torch.randn(300, 16) * scale
    stats = stats_of(x, weight, group_size=5)
    z = x.double() @ weight.double().T
    assert torch.equal(stats.ids[:, 0], z.argmax(-1))
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
    for target, above in ((3, 0), (1, 1), (0, 2), (2, 3), (4, 4)):
        ids = torch.tensor([target])
        logit, slack = target_logits_reference(x, weight, ids).unbind(-1)
        stats = stats_of(x, weight, target=Target(ids, logit, slack))
        assert stats.above.tolist() == [above]


def test_keys_are_logits_plus_noise() -> None:
    """The key winners carry their own ids and logits, through any order of blocks."""
    x, weight = torch.randn(6, 16), torch.randn(300, 16)
    noise = Noise(torch.arange(6), torch.arange(6) * 7, n_best=20)
    small, large = (stats_of(x, weight, noise=noise, vocab_block=size) for size in (11, 1000))
    assert torch.equal(small.key_ids, large.key_ids)
    z = float_logits(x, weight)
    torch.testing.assert_close(small.key_logits, z.gather(1, small.key_ids))
    assert (small.key_values.diff(dim=-1) <= 0).all()
    assert all(len(set(row)) == 20 for row in small.key_ids.tolist())


def test_mass_above() -> None:
    x, weight = torch.randn(3, 8), torch.randn(200, 8)
    scale = torch.tensor([1.0, 0.5, 2.0])
    z = (x @ weight.T) * scale[:, None]
    ids = torch.tensor([[0, 199], [5, 6], [100, 7]])
    logits = z.gather(1, ids)
    top = z.logsumexp(-1)
    mass = mass_above_reference(
        x, weight, scale=scale, than_logits=logits, than_ids=ids, top=top, vocab_block=33
    )
    probabilities = z.double().softmax(-1)
    for row in range(3):
        for place in range(2):
            expected = probabilities[row][z[row] > logits[row, place]].sum()
            assert abs(mass[row, place] - expected) <= LENS


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


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("n_ids", [2047, 4099])
def test_winners_found_by_their_spans(k: int, n_ids: int) -> None:
    """Enough ids that spans are looked at first, with so few values that most winners tie."""
    generator = torch.Generator().manual_seed(k)
    x = torch.eye(6)
    levels = torch.randint(0, 3, (n_ids, 6), generator=generator).float()
    levels[:, 3] = 0  # all tie
    levels[-1, 4] = 9  # the best lies beyond the last whole span
    stats = head_stats_reference(x, levels, k=k)
    order = levels.T.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(stats.ids, order.indices[:, :k])
    assert torch.equal(stats.values, order.values[:, :k])
    assert stats.ids[4, 0] == n_ids - 1 and stats.ids[3].tolist() == list(range(k))

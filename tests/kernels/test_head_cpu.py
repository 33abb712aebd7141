"""The head on CPU: exact of bf16 weights, whatever is skipped, and in little memory."""

from __future__ import annotations

import pytest
import torch
from tolerances import EFFECT, LENS
from torch import Tensor

from shardlens.bench.head_cpu import fresh_peak_bytes
from shardlens.kernels import Noise, head_stats_reference

TOP_K = 5


def bf16_problem(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Logits of deviation 3 at d 256, with ids that tie in every row."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 256, generator=generator).bfloat16()
    weight = (torch.randn(vocab, 256, generator=generator) * (3 / 16)).bfloat16()
    best = (x.double() @ weight.double().T).argmax(-1)
    # twins of the best ids, one of them with the lower id
    weight[0], weight[vocab - 1] = weight[best[0]], weight[best[-1]]
    return x, weight


def float64_head(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of the top k, log-sum-exp and entropy of the exact products."""
    z = x.double() @ weight.double().T
    logprobs = z.log_softmax(-1)
    ids = z.argsort(dim=-1, descending=True, stable=True)[:, :TOP_K]
    return ids, z.logsumexp(-1), -(logprobs.exp() * logprobs).sum(-1)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 33, 515])
def test_bf16_products_are_not_rounded(rows: int) -> None:
    """Default blocks, more than one of rows and of ids."""
    x, weight = bf16_problem(rows, 5003)
    ids, logsumexp, entropy = float64_head(x, weight)
    stats = head_stats_reference(x, weight, k=TOP_K).rows
    assert torch.equal(stats.token_ids, ids)
    total = stats.sum_exp.log()
    assert (stats.max + total - logsumexp).abs().max() <= LENS
    assert (total - stats.sum_dev / stats.sum_exp - entropy).abs().max() <= LENS


def test_rounded_products_would_show() -> None:
    x, weight = bf16_problem(33, 5003)
    ids, logsumexp, _ = float64_head(x, weight)
    rounded = (x @ weight.T).float()
    assert (rounded.logsumexp(-1) - logsumexp).abs().max() > EFFECT * LENS
    assert not torch.equal(rounded.topk(TOP_K).indices, ids)


@pytest.mark.parametrize("order", ["rising", "falling", "flat", "last_rises"])
def test_blocks_without_candidates_are_skipped_rightly(order: str) -> None:
    """Every block, none but the first, or only the last one changes the top-k."""
    logits = {
        "rising": torch.arange(90),
        "falling": torch.arange(90, 0, -1),
        "flat": torch.ones(90),
        "last_rises": torch.arange(90) // 89,
    }[order].float()
    x, weight = torch.tensor([[1.0], [0.0], [-1.0]]), logits[:, None]
    expected = (x @ weight.T).argsort(dim=-1, descending=True, stable=True)[:, :TOP_K]
    stats = head_stats_reference(x, weight, k=TOP_K, vocab_block=8).rows
    assert torch.equal(stats.token_ids, expected)


def test_sampled_rows_end_within_a_block_of_rows() -> None:
    """4 of 7 rows are sampled from, in blocks of 3: all, one and none of a block's rows."""
    x, weight = torch.randn(7, 16), torch.randn(100, 16)
    noise = Noise(torch.arange(4), torch.arange(4) * 5, n_best=3)
    whole = head_stats_reference(x, weight, k=2, noise=noise)
    parts = head_stats_reference(x, weight, k=2, noise=noise, row_block=3)
    assert whole.samples is not None and parts.samples is not None
    assert torch.equal(whole.samples.token_ids, parts.samples.token_ids)
    assert torch.equal(whole.rows.token_ids, parts.rows.token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_needs_less_than_a_tenth_of_full_logits(dtype: str) -> None:
    """At 512 rows and 128,256 ids, of what full logits, topk and logsumexp need."""
    ours, full = (fresh_peak_bytes(impl, dtype, 128_256) for impl in ("streamed", "full"))
    assert ours < full / 10

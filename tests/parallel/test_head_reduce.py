"""reduce_head: what it exchanges, targets that are none, and that the host never waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardlens.kernels import Chip, Noise, implementation, pretending
from shardlens.parallel import (
    HeadResult,
    TensorParallel,
    Traffic,
    VocabHead,
    reduce_head,
    split_vocab,
)

VOCAB, D = 509, 24


def head_of(parallel: TensorParallel, device: torch.device) -> VocabHead:
    # not the global generator, which ranks that are threads share
    full = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(3))
    span = split_vocab(VOCAB, parallel.rank, parallel.size)
    head = VocabHead(span, D, parallel=parallel).to(device)
    head.weight.data.zero_()
    head.weight.data[: span.size] = full[span.start : span.stop].to(device)
    return head


@pytest.mark.parametrize("ranks", [1, 3])
def test_ids_outside_the_vocabulary_are_no_targets(
    ranks: int, device: torch.device, run_ranks: Any, either: str
) -> None:
    """Rank -1 and log-prob NaN, also for an id that lies in a rank's padding."""
    x = torch.randn(6, D).to(device)
    target_ids = torch.tensor([0, VOCAB - 1, -1, VOCAB, -(2**40), 2**40]).to(device)

    def body(parallel: TensorParallel) -> HeadResult:
        return reduce_head(x, head_of(parallel, device), k=3, target_ids=target_ids)

    for found in run_ranks(ranks, body):
        assert (found.target_rank[2:] == -1).all() and found.target_logprob[2:].isnan().all()
        z = (x.double() @ head_of(TensorParallel.single(), device).weight.double().T).cpu()
        for row, target in enumerate((0, VOCAB - 1)):
            assert found.target_rank[row] == (z[row] > z[row, target]).sum()
        assert found.target_logprob[:2].isfinite().all()


@pytest.mark.parametrize("n_samples, n_best", [(0, 0), (1, 1), (2, 5)])
def test_one_exchange_of_few_bytes(n_samples: int, n_best: int, run_ranks: Any) -> None:
    """Per row 8k + 24 bytes for each other rank, and 12 per candidate of a sample."""
    k, rows, device = 4, 6, torch.device("cpu")
    seeds = torch.arange(n_samples)
    noise = Noise(seeds, seeds, n_best) if n_samples else None

    def body(parallel: TensorParallel) -> Traffic:
        reduce_head(torch.ones(rows, D), head_of(parallel, device), k=k, noise=noise)
        return parallel.traffic.copy()

    sent = 2 * (rows * (8 * k + 24) + 12 * n_samples * n_best)
    assert run_ranks(3, body) == [Traffic({"all_gather": sent}, {"all_gather": 1})] * 3


def test_rows_of_a_result() -> None:
    """Row 1 of each request of 3, by a slice and by an index; samples belong to no choice."""
    head = head_of(TensorParallel.single(), torch.device("cpu"))
    seeds = torch.arange(2)
    noise = Noise(seeds, seeds, sample_row=1)
    x = torch.randn(6, D)
    whole = reduce_head(x, head, k=3, target_ids=torch.arange(6), rows_per_request=3, noise=noise)
    assert whole.samples is not None
    for index in (slice(1, None, 3), torch.tensor([1, 4])):
        chosen = whole.rows(index)
        assert chosen.samples is None
        for name in ("token_ids", "logits", "logprobs", "logsumexp", "entropy", "target_logprob"):
            value = getattr(whole, name)
            assert torch.equal(getattr(chosen, name), torch.stack((value[1], value[4]))), name
        assert chosen.target_rank.tolist() == [whole.target_rank[1], whole.target_rank[4]]
        assert chosen.kl_to_final.tolist() == [whole.kl_to_final[1], whole.kl_to_final[4]]


@pytest.mark.parametrize("rows, rows_per_request", [(8, 4), (264, 4), (264, 132)])
def test_nothing_waits_for_the_device(rows: int, rows_per_request: int) -> None:
    """Meta tensors have no values: whatever the host asked of one would raise."""
    device = torch.device("meta")
    head = VocabHead(split_vocab(VOCAB, 0, 1), D, parallel=TensorParallel.single()).to(device)
    launched: list[Any] = []
    keys = torch.zeros(2, dtype=torch.int64, device=device)
    with implementation("triton"), pretending(Chip(90, 132), lambda *call: launched.append(call)):
        found = reduce_head(
            torch.zeros(rows, D, device=device),
            head,
            k=3,
            scale=torch.ones(rows, device=device),
            target_ids=torch.zeros(rows, dtype=torch.int64, device=device),
            rows_per_request=rows_per_request,
            noise=Noise(keys, keys, n_best=2, sample_row=rows_per_request - 1),
        )
    assert launched
    assert found.samples is not None
    assert found.token_ids.shape == (rows, 3) and found.samples.token_ids.shape == (2, 2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((found.target_rank < 0).any())

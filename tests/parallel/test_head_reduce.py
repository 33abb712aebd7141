"""reduce_head: targets that are none, and that the host never waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardlens.kernels.dispatch import implementation
from shardlens.kernels.head_stats_reference import Noise
from shardlens.kernels.launch import Chip, pretending
from shardlens.parallel.group import TensorParallel
from shardlens.parallel.head_reduce import Winners, reduce_head
from shardlens.parallel.spans import split_vocab
from shardlens.parallel.vocab import VocabHead

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

    def body(parallel: TensorParallel) -> Winners:
        return reduce_head(x, head_of(parallel, device), k=3, target_ids=target_ids)

    for found in run_ranks(ranks, body):
        assert (found.target_rank[2:] == -1).all() and found.target_logprob[2:].isnan().all()
        z = (x.double() @ head_of(TensorParallel.single(), device).weight.double().T).cpu()
        for row, target in enumerate((0, VOCAB - 1)):
            assert found.target_rank[row] == (z[row] > z[row, target]).sum()
        assert found.target_logprob[:2].isfinite().all()


@pytest.mark.parametrize("rows, group", [(8, 4), (264, 4), (264, 132)])
def test_nothing_waits_for_the_device(rows: int, group: int) -> None:
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
            group_size=group,
            noise=Noise(keys, keys, n_best=2, place=group - 1),
        )
    assert launched
    assert found.token_ids.shape == (rows, 3) and found.key_ids.shape == (2, 2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((found.target_rank < 0).any())

"""Logits of targets: against float64 and the reference, over slices, registered, refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import assert_as_good

from shardlens.kernels import (
    implementation,
    target_logits,
    target_logits_reference,
    tensor_core_slack,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, vocab, d", [(1, 509, 96), (7, 30, 507), (130, 200, 64)])
def test_against_float64(
    rows: int, vocab: int, d: int, dtype: torch.dtype, device: torch.device, either: str
) -> None:
    x, weight = (torch.randn(n, d).to(device, dtype) for n in (rows, vocab))
    ids = torch.randint(vocab, (rows,)).to(device)
    found = target_logits(x, weight, ids)
    exact = (x.double() * weight[ids].double()).sum(-1)
    plain = target_logits_reference(x, weight, ids)
    pair = (found[:, 0].reshape(1, -1), plain[:, 0].reshape(1, -1), exact.reshape(1, -1))
    assert_as_good(*pair, lost=tensor_core_slack(d, dtype) if either == "triton" else 0)
    assert (found[:, 1] == (0 if either == "triton" else plain[:, 1])).all()


def test_slices_sum_to_the_whole(device: torch.device, either: str) -> None:
    """A slice says 0 of ids that it lacks, of none, and of every id if it is empty."""
    x, weight = torch.randn(9, 32, device=device), torch.randn(100, 32, device=device)
    ids = torch.tensor([0, 39, 40, 99, 100, -1, 41, 7, 1 << 40], device=device)
    whole = target_logits(x, weight, ids)
    cuts = (0, 40, 40, 100)
    parts = [
        target_logits(x, weight[low:high], ids, first_id=low)
        for low, high in itertools.pairwise(cuts)
    ]
    assert torch.equal(sum(parts, torch.zeros_like(whole)), whole)
    assert (parts[1] == 0).all() and (whole[[4, 5, 8]] == 0).all()
    assert (parts[0][[0, 1, 7], 0] != 0).all() and (parts[0][[2, 3, 6]] == 0).all()
    assert target_logits(x[:0], weight, ids[:0]).shape == (0, 2)


def test_rows_that_are_not_adjacent(device: torch.device, either: str) -> None:
    wide, tall = torch.randn(14, 300, device=device), torch.randn(96, 420, device=device)
    x, weight = wide[::2, 100:196], tall.T[::2]
    ids = torch.arange(7, device=device) * 20
    exact = (x.double() * weight[ids].double()).sum(-1)
    assert (target_logits(x, weight, ids)[:, 0] - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_infinite_neighbours_stay_out(device: torch.device, either: str) -> None:
    """Rows and targets of infinities beside a row do not touch its logit."""
    x, weight = torch.rand(3, 16, device=device) + 1, torch.rand(5, 16, device=device) + 1
    x[1], weight[4] = torch.inf, -torch.inf
    found = target_logits(x, weight, torch.tensor([0, 1, 4], device=device))[:, 0]
    assert torch.equal(found[1:].cpu(), torch.tensor([torch.inf, -torch.inf]))
    assert (found[0] - x[0] @ weight[0]).abs() <= 1e-5 * found[0]


def test_op(device: torch.device, either: str) -> None:
    x, weight = torch.randn(6, 16, device=device), torch.randn(20, 16, device=device)
    ids = torch.arange(6, device=device)
    torch.library.opcheck(torch.ops.shardlens.target_logits, (x, weight, ids, 0, 5))
    compiled = torch.compile(target_logits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, ids), target_logits(x, weight, ids))


def test_many_candidates_take_the_reference(device: torch.device) -> None:
    """Where `head_stats` runs its reference, so does the target's logit, with its slack."""
    x, weight = torch.randn(4, 16, device=device), torch.randn(100, 16, device=device)
    ids = torch.arange(4, device=device)
    with implementation("triton"):
        assert (target_logits(x, weight, ids, k=64)[:, 1] == 0).all()
        assert (target_logits(x, weight, ids, k=65)[:, 1] > 0).all()


def test_refusals(device: torch.device) -> None:
    x, weight = torch.randn(4, 16, device=device), torch.randn(20, 16, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        target_logits(x, weight[:, :8], torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target_ids \[3\] are not one for each of 4 rows"):
        target_logits(x, weight, torch.zeros(3, dtype=torch.int64))

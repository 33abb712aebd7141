"""Top-k, ranks and ties of the head, although tensor cores truncate their sums.

On a GPU these run on its own tensor cores, elsewhere on those of `interpreter.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from shardlens.kernels import (
    Chip,
    RowStats,
    Target,
    head_cut,
    head_stats,
    head_stats_reference,
    implementation,
    target_logits,
    target_logits_reference,
    tensor_core_slack,
)
from shardlens.kernels.launch import Config
from shardlens.kernels.triton_shim import tl, triton

module = import_module("shardlens.kernels.head_stats")  # the package gives the function that name
V, D, K, FIRST_ID = 250, 4096, 8, 1000
TWINS = {17: 150, 5: 249, 130: 131}  # rows of W that equal earlier ones


@triton.jit
def _multiply(a, b, acc, out):
    row, depth = tl.arange(0, 16)[:, None], tl.arange(0, 32)
    x = tl.load(a + row * 32 + depth[None, :])
    w = tl.load(b + row * 32 + depth[None, :])
    entry = row * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + entry, tl.dot(x, tl.trans(w), tl.load(acc + entry)))


def test_the_accumulator_is_truncated(device: torch.device) -> None:
    """2^24 + 1.5 is 2^24 if truncated and 2^24 + 2 if rounded; sums of 16 columns are exact."""
    a = torch.zeros(16, 32, dtype=torch.bfloat16, device=device)
    a[:, 3], a[:, 7] = 1.0, 0.5
    a[1, 16] = 1.0  # a second step: lost, too
    a[2, 4] = 0.5  # in the first step: 2 in all, which is kept
    b, out = torch.ones_like(a), torch.empty(16, 16, device=device)
    with torch.no_grad():
        _multiply[(1,)](a, b, torch.full_like(out, 2.0**24), out)
    expected = torch.full((16,), 2.0**24)
    expected[2] += 2
    assert torch.equal(out.cpu(), expected[:, None].expand(16, 16))


def problem(n_rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(n_rows, D), torch.randn(V, D) * 3 / D**0.5
    for first, second in TWINS.items():
        weight[second] = weight[first]
    return x.to(device, dtype), weight.to(device, dtype)


def ask(x: Tensor, weight: Tensor, ids: Tensor, scale: Tensor | None) -> tuple[RowStats, Target]:
    logits, slack = target_logits(x, weight, ids, first_id=FIRST_ID, k=K).unbind(-1)
    target = Target(ids, logits if scale is None else logits * scale, slack)
    stats = head_stats(x, weight, k=K, first_id=FIRST_ID, target=target, scale=scale)
    return stats.rows, target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_targets_rank_is_its_position(dtype: torch.dtype, device: torch.device) -> None:
    """A target has the bits of its own streamed logit: it ties with its twins and with itself."""
    x, weight = problem(16, dtype, device)
    scale = torch.rand(16, device=device) + 0.5
    with implementation("triton"):
        best = head_stats(x, weight, k=K, first_id=FIRST_ID, scale=scale).rows
        differ = 0
        for rank in (0, 3, 7):
            ids = best.token_ids[:, rank]
            stats, target = ask(x, weight, ids, scale)
            assert (target.slack == 0).all()
            assert torch.equal(target.logits, best.logits[:, rank])
            assert torch.equal(stats.target_logit, best.logits[:, rank])
            assert (stats.target_rank == rank).all()
            plain = target_logits_reference(x, weight, ids, first_id=FIRST_ID)[:, 0] * scale
            differ += int((plain != target.logits).sum())
    assert differ > 24  # of 48: a product of its own would have other bits
    for first, second in list(TWINS.items())[:2]:
        both = torch.tensor([[first], [second]], device=device) + FIRST_ID
        with implementation("triton"):
            (lower, _), (higher, _) = (ask(x, weight, ids.expand(16), None) for ids in both)
        assert torch.equal(lower.target_logit, higher.target_logit)
        assert torch.equal(higher.target_rank, lower.target_rank + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_chain_loses(dtype: torch.dtype, device: torch.device) -> None:
    """Logits miss float64 by no more than the slack says, and by more than rounding would."""
    x, weight = problem(16, dtype, device)
    with implementation("triton"):
        stats = head_stats(x, weight, k=K).rows
    exact = (x.double() @ weight.double().T).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(stats.token_ids[:, 0], exact.indices[:, 0])
    best, largest = exact.values[:, :K], exact.values[:, :1]
    lost = ((best - stats.logits) / largest).max().item()
    assert 0 < lost <= tensor_core_slack(D, dtype)
    plain = head_stats_reference(x.float(), weight.float(), k=K).rows
    rounded = ((plain.logits - best) / largest).abs().max().item()
    assert rounded < lost / 3 or device.type == "cuda"  # else the slack would not be needed


@pytest.mark.parametrize("n_rows", [16, 140])
def test_configurations_agree_to_the_bit(
    n_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the configurations a timing chooses, nothing that is said changes."""
    x, weight = problem(n_rows, torch.bfloat16, device)
    ids = torch.arange(n_rows, device=device) % V + FIRST_ID
    found: list[RowStats] = []

    def with_each(key: Any, device: Any, configs: Sequence[Config], run: Any) -> Config:
        offered = list(configs)
        if device.type == "cpu":  # the interpreter has one: others of as many rows, ids of a part
            rows, _, _, part, _ = configs[0].tile
            offered = [Config((rows, *widths, part, 0), 4) for widths in ((128, 64), (64, 128))]
        return offered[len(found) % len(offered)]

    monkeypatch.setattr(module, "choose", with_each)
    with implementation("triton"):
        for _ in range(3):
            found.append(ask(x[:, :512], weight[:, :512], ids, None)[0])
    for other in found[1:]:
        for name, value in vars(found[0]).items():
            assert torch.equal(getattr(other, name), value), name


@pytest.mark.parametrize("capability, processors", [(80, 108), (89, 142), (90, 132), (120, 188)])
def test_configurations_round_alike(capability: int, processors: int) -> None:
    """Rows, ids of a part and warps decide the order of sums: they are those of the rows alone."""
    chip = Chip(capability, processors)
    for n_rows in (1, 16, 17, 33, 100, 129, 5000):
        for bulk in {False, chip.has_wide_products}:
            offered = head_cut.configs_of(n_rows, torch.bfloat16, chip, bulk)
            assert len({(c.tile[0], c.tile[3], c.warps) for c in offered}) == 1
            assert bulk or len(offered) == 1  # nothing is timed but where loads may be bulk

"""The head's kernels (on a GPU, or in the interpreter) against float64 and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assert_as_good
from tolerances import GUMBEL, LENS
from torch import Tensor

from shardlens.kernels import (
    HeadStats,
    Noise,
    SampleStats,
    Target,
    gumbel_reference,
    head_cut,
    head_stats,
    head_stats_reference,
    implementation,
    target_logits,
    tensor_core_slack,
)
from shardlens.parallel import HeadResult, TensorParallel, VocabHead, reduce_head, split_vocab


def inputs(rows: int, vocab: int, d: int, dtype: torch.dtype, device: torch.device) -> Any:
    x = torch.randn(rows, d).to(device, dtype)
    return x, (torch.randn(vocab, d) * 3 / d**0.5).to(device, dtype)


def targets(x: Tensor, weight: Tensor, scale: Tensor, first_id: int) -> Target:
    """Ids before, in and after the slice, and none; logits of what runs now."""
    ids = torch.randint(-1, weight.shape[0], (x.shape[0],)).to(x.device) + first_id
    ids[1::7], ids[2::7], ids[3::7] = -1, 0, first_id + weight.shape[0] + 5
    logits, slack = target_logits(x, weight, ids, first_id=first_id).unbind(-1)
    logits = (logits * scale).masked_fill(ids < 0, torch.inf)
    return Target(ids, logits, slack * scale)


def assert_close(found: HeadStats, expected: HeadStats) -> None:
    ours = found.tensors()
    for name, value in expected.tensors().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


def samples_of(stats: HeadStats) -> SampleStats:
    assert stats.samples is not None
    return stats.samples


def summary(head: HeadStats, rows_per_request: int) -> dict[str, Tensor]:
    """The statistics of the sums: log-sum-exp, entropy, KL's gap; the top-k and the target."""
    stats = head.rows
    total = stats.sum_exp.double()
    request = torch.arange(len(total), device=total.device) // rows_per_request
    reference = ((request + 1) * rows_per_request - 1).clamp(max=max(0, len(total) - 1))
    return {
        "logits": stats.logits,
        "logsumexp": (stats.max + total.log()).float(),
        "entropy": (total.log() - stats.sum_dev / total).float(),
        "gap": (stats.cross / total[reference]).float(),
        "target": stats.target_logit,
    }


@torch.no_grad()
def truth_of(x: Tensor, weight: Tensor, k: int, scale: Tensor, g: int, local: Tensor) -> Any:
    z = (x.double() @ weight.double().T) * scale.double()[:, None]
    logp = z.log_softmax(-1)
    final = z.view(-1, g, z.shape[1])[:, -1:] if len(z) else z[None, :1]
    gap = final.softmax(-1) * (final - z.view(-1, g, z.shape[1])) if len(z) else z[None]
    here = (local >= 0) & (local < z.shape[1])
    order = torch.sort(z, dim=-1, descending=True, stable=True)
    return order.indices[:, :k], {
        "logits": order.values[:, :k],
        "logsumexp": z.logsumexp(-1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "gap": gap.sum(-1).flatten(),
        "target": z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0].where(here, 0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, vocab, d, k, per_request",
    [(0, 509, 96, 5, 1), (1, 1000, 4096, 1, 1), (7, 509, 507, 9, 7), (123, 300, 96, 5, 3)],
)
def test_against_float64(
    rows: int,
    vocab: int,
    d: int,
    k: int,
    per_request: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    x, weight = inputs(rows, vocab, d, dtype, device)
    scale, first_id = torch.rand(rows, device=device) + 0.5, 1000
    options: dict[str, Any] = dict(
        k=k, first_id=first_id, scale=scale, rows_per_request=per_request
    )
    torch.manual_seed(1)
    with implementation("triton"):
        ours = head_stats(x, weight, target=targets(x, weight, scale, first_id), **options)
    torch.manual_seed(1)
    with implementation("reference"):
        target = targets(x, weight, scale, first_id)
    plain = head_stats_reference(x, weight, target=target, **options)
    ids, truth = truth_of(x, weight, k, scale, per_request, target.ids - first_id)
    assert torch.equal(ours.rows.token_ids, ids + first_id)
    assert torch.equal(ours.rows.target_rank, plain.rows.target_rank)
    found, reference = summary(ours, per_request), summary(plain, per_request)
    for name in truth if rows else ():
        if name == "gap" and per_request == 1:
            assert (ours.rows.cross == 0).all()
        else:
            pair = (found[name], reference[name], truth[name])
            lost = tensor_core_slack(d, dtype)
            assert_as_good(*(value.reshape(1, -1) for value in pair), lost=lost)


def test_large_values_in_bf16(device: torch.device) -> None:
    """Logits of 1e4 and more: sums stay finite, top-k and entropy right."""
    x, weight = inputs(5, 509, 96, torch.bfloat16, device)
    x = x * 1e4
    with implementation("triton"):
        stats = head_stats(x, weight, k=3, rows_per_request=5).rows
    unscaled = torch.ones(5, device=device)
    ids, truth = truth_of(x, weight, 3, unscaled, 5, torch.full((5,), -1, device=device))
    assert torch.equal(stats.token_ids, ids)
    for name in ("sum_exp", "sum_dev", "cross"):
        assert getattr(stats, name).isfinite().all(), name
    torch.testing.assert_close(stats.logits.double(), truth["logits"], rtol=1e-6, atol=0)


def test_vocabulary_padded_with_minus_infinity(device: torch.device, either: str) -> None:
    """Ids whose logits are -inf, at either end of the slice, are as if they were not there."""
    x, weight = torch.rand(6, 16, device=device) + 0.1, torch.randn(509, 16, device=device)
    weight[:150], weight[400:] = -torch.inf, -torch.inf
    options: dict[str, Any] = dict(k=4, rows_per_request=3)
    ours = head_stats(x, weight, **options)
    inner = head_stats_reference(x, weight[150:400], first_id=150, **options)
    assert_close(ours, inner)
    few = head_stats(x, weight[398:], k=4, first_id=398).rows.token_ids
    assert (few[:, :2] >= 398).all() and (few[:, 2:] == -1).all()
    none = head_stats(x, weight[:100], k=2).rows
    assert (none.token_ids == -1).all() and none.max.isneginf().all() and (none.sum_exp == 0).all()


@pytest.mark.parametrize("n_values", [1, 3])
def test_ties_across_tiles_and_shares(n_values: int, device: torch.device) -> None:
    """Candidates of equal logits are the lowest ids, however the slice is walked."""
    of_id = torch.arange(700, device=device) % n_values
    x, weight = torch.ones(3, 16, device=device), of_id[:, None].float().expand(700, 16)
    with implementation("triton"):
        stats = head_stats(x, weight.contiguous(), k=10).rows
    assert stats.token_ids.tolist() == [[*range(n_values - 1, 10 * n_values, n_values)]] * 3


def test_strided_inputs_and_small_slices(device: torch.device) -> None:
    wide, tall = torch.randn(14, 300, device=device), torch.randn(96, 420, device=device)
    for x, weight in ((wide[::2, 100:196], tall.T[::2]), (wide[:7, ::3][:, :96], tall.T[:3])):
        options: dict[str, Any] = dict(k=5, rows_per_request=7)
        with implementation("triton"):
            ours = head_stats(x, weight, **options)
        plain = head_stats_reference(x, weight, **options)
        assert_close(ours, plain)
        assert torch.equal(
            ours.rows.token_ids, plain.rows.token_ids
        )  # -1 beyond the ids of the slice
    pairs = torch.rand(7, 2, device=device) + 0.5
    numbers = torch.arange(6, device=device).view(3, 2)
    noise = Noise(numbers[:, 0], numbers[:, 1])
    assert not (pairs[:, 0].is_contiguous() or noise.seed.is_contiguous())
    with implementation("triton"):
        ours = head_stats(x, weight, k=3, scale=pairs[:, 0], noise=noise)
    plain = head_stats_reference(x, weight, k=3, scale=pairs[:, 0], noise=noise)
    assert_close(ours, plain)
    with implementation("triton"):
        none = head_stats(x, weight[:0], k=5).rows
    assert (none.token_ids == -1).all() and none.max.isneginf().all() and (none.sum_exp == 0).all()


@pytest.mark.parametrize("per_request", [2, 130, 300])
def test_requests_of_any_length(per_request: int, device: torch.device) -> None:
    """More rows than a tile; requests of 130 and 300 rows are longer than a tile."""
    x, weight = inputs(300 // per_request * per_request, 200, 32, torch.float32, device)
    scale = torch.rand(len(x), device=device) + 0.5
    target = targets(x, weight, scale, 0)
    seeds = torch.arange(min(2, len(x) // per_request), device=device)
    noise = Noise(seeds, seeds, sample_row=per_request // 2)
    options: dict[str, Any] = dict(
        k=2, scale=scale, target=target, rows_per_request=per_request, noise=noise
    )
    with implementation("triton"):
        ours = head_stats(x, weight, **options)
    plain = head_stats_reference(x, weight, **options)
    assert_close(ours, plain)
    assert plain.rows.cross.abs().max() > 0.1


@pytest.mark.parametrize("rows", [3, 140])
def test_samples_are_those_of_the_reference(rows: int, device: torch.device) -> None:
    """Keys, their ids and logits, for all rows or the leading ones, each row with its scale."""
    x, weight = inputs(rows, 509, 32, torch.float32, device)
    scale = torch.rand(rows, device=device) + 0.5
    for n_samples in (1, 3) if rows == 3 else (130,):
        seeds = torch.arange(n_samples, device=device) * 2**40 + 11
        noise = Noise(seeds, torch.arange(n_samples, device=device) + 7, n_best=3)
        with implementation("triton"):
            ours = head_stats(x, weight, k=1, first_id=77, scale=scale, noise=noise)
        plain = head_stats_reference(x, weight, k=1, first_id=77, scale=scale, noise=noise)
        found, expected = samples_of(ours), samples_of(plain)
        assert torch.equal(found.token_ids, expected.token_ids)
        torch.testing.assert_close(found.keys, expected.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_noise_is_accurate(device: torch.device) -> None:
    """Logits of 0 leave the noise alone; its largest values are where digits are easily lost."""
    x, weight = torch.zeros(64, 16, device=device), torch.zeros(1000, 16, device=device)
    noise = Noise(torch.arange(64, device=device), torch.full((64,), 5, device=device), 4)
    with implementation("triton"):
        samples = samples_of(head_stats(x, weight, k=1, noise=noise))
    exact = gumbel_reference(
        noise.seed[:, None], noise.step[:, None], torch.arange(1000, device=device)[None]
    )
    order = torch.sort(exact, dim=-1, descending=True)
    assert torch.equal(samples.token_ids, order.indices[:, :4])
    assert (samples.keys - order.values[:, :4]).abs().max() <= GUMBEL


def test_bulk_loads(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The descriptors that feed many rows; the interpreter knows them for float32."""
    if device.type == "cpu":
        monkeypatch.setattr(head_cut, "INTERPRETED", (64, 32, 64, 1))
    head_cut.cut.cache_clear()
    x, weight = inputs(70, 130, 48, torch.float32, device)
    with implementation("triton"):
        ours = head_stats(x, weight, k=3, rows_per_request=7)
    plain = head_stats_reference(x, weight, k=3, rows_per_request=7)
    head_cut.cut.cache_clear()
    assert_close(ours, plain)


def test_logits_that_are_not_finite_end_the_walk(device: torch.device) -> None:
    """NaN and infinite rows must not hang the kernel: their sums say what they are."""
    x, weight = inputs(4, 100, 16, torch.float32, device)
    x[0, 0], x[1, 0], x[2] = torch.nan, torch.inf, -torch.inf
    with implementation("triton"):
        stats = head_stats(x, weight, k=3).rows
    assert not (stats.max + stats.sum_exp.log())[:3].isfinite().any()
    assert stats.sum_exp[3].isfinite()


def test_op(device: torch.device, either: str) -> None:
    """Registration, and a compiled caller that gives what the eager one gives."""
    x, weight = inputs(6, 100, 16, torch.float32, device)
    unscaled = torch.ones(6, device=device)
    target = targets(x, weight, unscaled, 0)
    noise = Noise(torch.arange(2, device=device), torch.arange(2, device=device), 2, 1)
    tensors = [target.ids, target.logits, target.slack], [noise.seed, noise.step]
    arguments = (x, weight, None, *tensors, [4, 0, 3, 2, 1])
    torch.library.opcheck(torch.ops.shardlens.head_stats, arguments)

    def run(x: Tensor) -> HeadStats:
        return head_stats(x, weight, k=4, target=target, rows_per_request=3, noise=noise)

    eager, compiled = run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    found = compiled.tensors()
    for name, value in eager.tensors().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sharded_head(ranks: int, device: torch.device, run_ranks: Any) -> None:
    """Ids that tie across ranks, an uneven vocabulary, everything against one exact head."""
    torch.manual_seed(2)
    full, x = torch.randn(509, 24), torch.randn(8, 24).to(device)
    full[100], full[400], full[101] = full[7], full[7], full[7]
    target_ids = torch.tensor([7, 100, 101, 400, -1, 0, 508, 509]).to(device)
    seeds = torch.arange(2, device=device)
    noise = Noise(seeds, torch.zeros_like(seeds), sample_row=3)

    def body(parallel: TensorParallel) -> HeadResult:
        span = split_vocab(509, parallel.rank, parallel.size)
        head = VocabHead(span, 24, parallel=parallel).to(device)
        head.weight.data.zero_()
        head.weight.data[: span.size] = full[span.start : span.stop].to(device)
        return reduce_head(x, head, k=6, target_ids=target_ids, rows_per_request=4, noise=noise)

    with implementation("reference"):
        exact = run_ranks(1, body)[0]
    with implementation("triton"):
        results = run_ranks(ranks, body)

    def tensors(result: HeadResult) -> dict[str, Tensor]:
        assert result.samples is not None
        samples = {f"samples.{name}": value for name, value in vars(result.samples).items()}
        return {n: v for n, v in vars(result).items() if n != "samples"} | samples

    for result in results:
        for name, value in tensors(exact).items():
            found = tensors(result)[name]
            if value.dtype == torch.int64:
                assert torch.equal(found, value), name
            else:
                torch.testing.assert_close(found, value, rtol=LENS, atol=LENS, equal_nan=True)


def test_refusals(device: torch.device) -> None:
    x, weight = inputs(4, 20, 16, torch.float32, device)
    with pytest.raises(ValueError, match="do not fit"):
        head_stats(x, weight[:, :8], k=1)
    with pytest.raises(ValueError, match="k of 0"):
        head_stats(x, weight, k=0)
    with pytest.raises(ValueError, match="whole requests of 3"):
        head_stats(x, weight, k=1, rows_per_request=3)
    seeds = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="sample_row 2"):
        head_stats(x, weight, k=1, rows_per_request=2, noise=Noise(seeds, seeds, sample_row=2))
    with pytest.raises(ValueError, match="2 seeds for 1 request"):
        head_stats(x, weight, k=1, rows_per_request=4, noise=Noise(seeds, seeds))

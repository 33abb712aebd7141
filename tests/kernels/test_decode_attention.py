"""decode_attention against float64: lengths, splits, strides, poison, registration."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import assert_as_good
from tolerances import EFFECT, KERNEL_EPS
from torch import Tensor

from shardlens.kernels import decode_attention, decode_attention_reference, implementation
from shardlens.kernels.decode_attention import split_count

HALF_TYPES = [torch.bfloat16, torch.float16]


def exact(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """float64, request by request, without a mask."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    shared = q.shape[1] // keys.shape[1]
    for request, length in enumerate(lengths.tolist()):
        if length:
            key, value = (
                x[request, :, :length].double().repeat_interleave(shared, 0) for x in (keys, values)
            )
            score = torch.einsum("hd,hsd->hs", q[request].double(), key) / math.sqrt(q.shape[-1])
            out[request] = torch.einsum("hs,hsd->hd", score.softmax(-1), value)
    return out


def inputs(
    lengths: list[int],
    n_heads: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, and one layer of a cache that holds zeros beyond the lengths, as the model's does."""
    batch = len(lengths)
    q = torch.randn(batch, n_heads, head_dim).to(dtype)
    cache = torch.randn(2, 3, batch, kv_heads, capacity, head_dim).to(dtype)
    for request, length in enumerate(lengths):
        cache[:, :, request, :, length:] = 0
    return q, cache[0, 1], cache[1, 1], torch.tensor(lengths, dtype=torch.int64)


def check(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, span: int | None) -> Tensor:
    """The kernel on a cache full of NaN beyond the lengths is as good as the reference without."""
    beyond = torch.arange(keys.shape[2], device=q.device) >= lengths[:, None]
    poison = (torch.where(beyond[:, None, :, None], math.nan, x) for x in (keys, values))
    with implementation("triton"):
        out = decode_attention(q, *poison, lengths, span=span)
        assert torch.equal(out, decode_attention(q, keys, values, lengths, span=span))
    assert out.is_contiguous()
    plain = decode_attention_reference(q, keys, values, lengths, span=span)
    assert_as_good(out, plain, exact(q, keys, values, lengths))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
@pytest.mark.parametrize(
    "lengths, n_heads, kv_heads, capacity, head_dim",
    [
        ([], 4, 2, 40, 20),
        ([0], 4, 4, 16, 20),
        ([1], 4, 2, 1, 96),
        ([123, 0, 1, 7, 128, 64, 65], 4, 1, 130, 20),
        ([300, 7, 0], 8, 1, 400, 128),  # three splits, of which the short requests fill few
        ([507, 2], 4, 2, 507, 96),
    ],
)
def test_against_float64(
    lengths: list[int],
    n_heads: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    made = inputs(lengths, n_heads, kv_heads, capacity, head_dim, dtype)
    q, keys, values, on_device = (x.to(device) for x in made)
    out = check(q, keys, values, on_device, None)
    assert torch.equal(out[on_device == 0], torch.zeros_like(out[on_device == 0]))
    if lengths:
        check(q, keys, values, on_device.int(), max(lengths))


@pytest.mark.parametrize("n_heads, kv_heads", [(3, 3), (5, 1), (16, 1), (6, 2)])
def test_shared_heads(n_heads: int, kv_heads: int, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made = inputs([37, 260], n_heads, kv_heads, 270, 80, dtype)
        check(*(x.to(device) for x in made), None)


def test_strided_and_extreme(device: torch.device) -> None:
    q, keys, values, lengths = (x.to(device) for x in inputs([9, 40], 4, 2, 48, 20, torch.float32))
    wide = torch.randn(2, 8, 60, device=device)
    by_position = torch.randn(2, 48, 2, 20, device=device).transpose(1, 2)  # [B, K, S, D]
    both = torch.stack((lengths, lengths), 1)
    for strided in (wide[:, ::2, 20:40], wide[:, :4, ::3], wide.transpose(0, 1)[:2, :1, :20]):
        shared = keys[:, : strided.shape[1] // 2 or 1]
        check(strided, shared, values[:, : shared.shape[1]], both[:, 1], None)
    check(q, by_position, values, both[:, 0], 41)
    for size in (1e4, 1e2):
        signs = (torch.randn_like(x).sign() for x in (q, keys, values))
        huge = (x.bfloat16() * size for x in signs)
        check(*huge, lengths, None)


def test_every_position_counts(device: torch.device) -> None:
    made = inputs([300, 123], 4, 1, 400, 96, torch.float32)
    q, keys, values, lengths = (x.to(device) for x in made)
    truth = exact(q, keys, values, lengths)
    tolerance = KERNEL_EPS * torch.finfo(torch.float32).eps * truth.abs().amax(-1)
    for wrong in (lengths - 1, lengths + 1):
        with implementation("triton"):
            out = decode_attention(q, keys, values, wrong)
        assert ((out - truth).abs().amax(-1) > EFFECT * tolerance).all()
        with pytest.raises(AssertionError, match="beyond what is allowed"):
            assert_as_good(out, decode_attention_reference(q, keys, values, lengths), truth)


def test_lengths_outside_the_cache_read_nothing(device: torch.device, either: str) -> None:
    made = inputs([20, 0], 2, 1, 20, 16, torch.float32)
    q, keys, values, lengths = (x.to(device) for x in made)
    outside = torch.tensor([10**9, -5], device=device)
    out = decode_attention(q, keys, values, outside)
    assert torch.equal(out, decode_attention(q, keys, values, lengths))


def test_split_count() -> None:
    assert split_count(16, 100, 264) == 1  # a small cache
    assert split_count(64, 8192, 264) == 4  # 256 programs for 264 that run at once
    assert split_count(64, 255, 264) == 1 and split_count(64, 256, 264) == 2
    assert split_count(1, 1 << 20, 10_000) == 122  # within 5% of the most, 128
    assert split_count(264, 8192, 264) == 1
    assert split_count(300, 8192, 264) == 6  # one split a pair would leave 36 for a second wave


def test_opcheck(device: torch.device, either: str) -> None:
    for capacity, span in ((20, None), (260, 257)):
        made = inputs([1, 20], 4, 2, capacity, 20, torch.float32)
        q, keys, values, lengths = (x.to(device) for x in made)
        torch.library.opcheck(
            torch.ops.shardlens.decode_attention, (q, keys, values, lengths, span)
        )
        through_op = torch.ops.shardlens.decode_attention(q, keys, values, lengths, span)
        assert torch.equal(through_op, decode_attention(q, keys, values, lengths, span=span))


def test_what_does_not_fit_is_refused() -> None:
    q, keys, values, lengths = inputs([1, 2], 4, 2, 8, 16, torch.float32)
    with pytest.raises(ValueError, match="q \\[2, 4, 15\\] does not go with"):
        decode_attention(q[..., 1:], keys, values, lengths)
    with pytest.raises(ValueError, match="3 query heads"):
        decode_attention(q[:, 1:], keys, values, lengths)
    with pytest.raises(ValueError, match="dtypes differ"):
        decode_attention(q.half(), keys, values, lengths)
    with pytest.raises(ValueError, match="one integer per request"):
        decode_attention(q, keys, values, lengths.float())

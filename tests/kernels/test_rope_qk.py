"""rope_qk against float64: rotation, norm, what is written where, strides, registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assert_as_good
from tolerances import EFFECT, KERNEL_EPS
from torch import Tensor

from shardlens.kernels import implementation, rope_angles_reference, rope_qk, rope_qk_reference

EPS = 1e-6


def exact(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
    """Heads x [B, T, ., D], normalised and rotated in float64, with the norm's own cast."""
    dtype, x = x.dtype, x.double()
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        if dtype != torch.float32:
            x = x.to(dtype).double()
        x = x * weight.double()
    a, b = x.tensor_split(2, -1)
    cos, sin = cos.double(), sin.double()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def inputs(
    batch: int,
    n_tokens: int,
    n_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    norm: bool,
    capacity: int = 24,
) -> dict[str, Any]:
    """Arguments of rope_qk; every request starts at a position of its own."""
    size = (n_heads + 2 * kv_heads) * head_dim
    starts = (7 * torch.arange(batch) + 3) % (capacity - n_tokens + 1)
    positions = (starts[:, None] + torch.arange(n_tokens)).to(device)
    inv_freq = 1 / 100 ** (torch.arange(0, head_dim, 2, device=device) / head_dim)
    cos, sin = rope_angles_reference(positions, inv_freq, dtype)
    cache = torch.randn(2, 3, batch, kv_heads, capacity, head_dim).to(device, dtype)
    weights = 1 + 0.3 * torch.randn(2, head_dim).to(device, dtype)
    given = dict(
        qkv=3 * torch.randn(batch, n_tokens, size).to(device, dtype),
        cos=cos,
        sin=sin,
        keys=cache[0, 1],
        values=cache[1, 1],
        positions=positions,
    )
    return given | dict(eps=EPS, q_weight=weights[0], k_weight=weights[1]) if norm else given


def run(given: dict[str, Any], function: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, keys and values, written into a copy of the cache."""
    keys, values = given["keys"].clone(), given["values"].clone()
    return function(**given | dict(keys=keys, values=values)), keys, values


def check(given: dict[str, Any]) -> Tensor:
    with implementation("triton"):
        q, keys, values = run(given, rope_qk)
    plain_q, plain_keys, plain_values = run(given, rope_qk_reference)
    cos, sin, head_dim = given["cos"], given["sin"], keys.shape[-1]
    heads, kv_heads = given["qkv"].unflatten(-1, (-1, head_dim)), keys.shape[1]
    n_heads = heads.shape[2] - 2 * kv_heads
    true_q = exact(heads[:, :, :n_heads], cos, sin, given.get("q_weight"))
    true_k = exact(heads[:, :, n_heads:-kv_heads], cos, sin, given.get("k_weight"))
    assert q.is_contiguous()
    assert_as_good(q, plain_q, true_q)

    rows = torch.arange(len(q), device=q.device)[:, None]
    true_keys, touched = given["keys"].double(), torch.zeros_like(keys, dtype=torch.bool)
    true_keys[rows, :, given["positions"]] = true_k
    touched[rows, :, given["positions"]] = True
    assert_as_good(keys, plain_keys, true_keys)
    assert torch.equal(keys[~touched], given["keys"][~touched])
    assert torch.equal(values, plain_values)
    assert torch.equal(values[~touched], given["values"][~touched])
    return q


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "batch, n_tokens, n_heads, kv_heads, head_dim",
    [
        (0, 1, 4, 2, 20),
        (2, 0, 4, 2, 20),
        (1, 1, 1, 1, 20),
        (7, 1, 8, 1, 96),
        (3, 5, 4, 4, 20),
        (2, 3, 8, 2, 128),
        (1, 2, 30, 5, 80),
    ],
)
def test_against_float64(
    batch: int,
    n_tokens: int,
    n_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    norm: bool,
    device: torch.device,
) -> None:
    check(inputs(batch, n_tokens, n_heads, kv_heads, head_dim, dtype, device, norm=norm))


def test_strided_and_shared_angles(device: torch.device) -> None:
    given = inputs(3, 4, 4, 2, 20, torch.float32, device, norm=True)
    wide = torch.randn(4, 3, 500, device=device)
    same = given["positions"][:1].expand(3, -1)  # one row of positions for all requests
    by_position = torch.randn(3, 24, 2, 20, device=device).transpose(1, 2)  # [B, K, S, D]
    for change in (
        dict(qkv=wide.transpose(0, 1)[..., 100:260]),
        dict(qkv=wide.transpose(0, 1)[..., ::3][..., :160]),
        dict(positions=same, cos=given["cos"][:1], sin=given["sin"][:1]),
        dict(cos=torch.randn(3, 4, 1, 20, device=device)[..., ::2]),
        dict(sin=torch.randn(4, 3, 1, 10, device=device).transpose(0, 1)),
        dict(keys=by_position),
        dict(values=by_position),
        dict(q_weight=torch.rand(20, 2, device=device)[:, 0]),
        dict(k_weight=torch.rand(20, 2, device=device)[:, 0]),
    ):
        check(given | change)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, on inf · 0 of v
def test_extreme(device: torch.device) -> None:
    for norm in (False, True):
        given = inputs(2, 3, 4, 2, 96, torch.bfloat16, device, norm=norm)
        given["qkv"] = given["qkv"].sign() * 1e4
        given["qkv"][0] = 0
        check(given)
    given["qkv"][..., -2 * 96 :] = torch.inf  # v is copied, not rotated by a zero angle
    with implementation("triton"):
        _, _, values = run(given, rope_qk)
    assert torch.equal(values, run(given, rope_qk_reference)[2])


def test_position_norm_and_weights_count(device: torch.device) -> None:
    given = inputs(2, 3, 4, 2, 20, torch.float32, device, norm=True)
    with implementation("triton"):
        q, keys, values = run(given, rope_qk)
        tolerance = KERNEL_EPS * torch.finfo(torch.float32).eps * q.abs().max()
        for change in (
            dict(q_weight=given["k_weight"], k_weight=given["q_weight"]),
            dict(eps=1.0),
            dict(sin=-given["sin"]),
            dict(cos=given["cos"].roll(1, 1)),
            dict(positions=given["positions"].flip(0)),
        ):
            others = run(given | change, rope_qk)
            if "positions" not in change:
                assert (others[0] - q).abs().max() > EFFECT * tolerance
            else:
                assert not torch.equal(others[2], values)
            assert (others[1] - keys).abs().max() > EFFECT * tolerance


def test_positions_outside_the_cache_write_nothing(device: torch.device) -> None:
    given = inputs(2, 3, 4, 2, 20, torch.float32, device, norm=False)
    given["positions"] = torch.tensor([[24, 25, 10**9], [-1, -2, -3]], device=device)
    with implementation("triton"):
        _, keys, values = run(given, rope_qk)
    assert torch.equal(keys, given["keys"]) and torch.equal(values, given["values"])


def test_opcheck(device: torch.device, either: str) -> None:
    for norm in (False, True):
        given = inputs(2, 3, 4, 2, 20, torch.float32, device, norm=norm)
        given["keys"], given["values"] = given["keys"].clone(), given["values"].clone()
        names = "qkv cos sin keys values positions eps q_weight k_weight".split()
        arguments = [given.get(name, 0.0 if name == "eps" else None) for name in names]
        torch.library.opcheck(torch.ops.shardlens.rope_qk, arguments)
        through_op = torch.ops.shardlens.rope_qk(*arguments)
        assert torch.equal(through_op, rope_qk(**given))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    given = inputs(2, 3, 4, 2, 20, torch.float32, device, norm=True)
    for message, change in (
        (r"qkv \[2, 3, 159\] does not go with", dict(qkv=given["qkv"][..., 1:])),
        ("no query head", dict(qkv=given["qkv"][..., :80])),
        (r"sin is \[2, 2, 1, 10\]", dict(sin=given["sin"][:, 1:])),
        ("dtypes differ", dict(qkv=given["qkv"].half())),
        ("positions is torch.int32", dict(positions=given["positions"].int())),
        ("come together", dict(k_weight=None)),
        ("adjacent", dict(keys=given["keys"].mT.contiguous().mT)),
    ):
        with pytest.raises(ValueError, match=message):
            rope_qk(**given | change)

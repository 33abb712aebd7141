"""Every operation at true model shapes, as calls: what `compiled.py` compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.decode_attention import decode_attention
from ..kernels.edits import Edits
from ..kernels.head_stats import Noise, Target, head_stats
from ..kernels.rmsnorm_steer import rmsnorm_steer
from ..kernels.rmsnorm_steer_backward import rmsnorm_steer_backward
from ..kernels.rope_qk import rope_qk
from ..kernels.swiglu import swiglu, swiglu_backward
from ..kernels.target_logits import target_logits

CASES: dict[str, Callable[[str], Any]] = {}
Run = Callable[[str], Any]


def case(name: str) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        CASES[name] = run
        return run

    return add


def bf16(device: str, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device)


def table(device: str, rows: int, d: int, n: int = 8) -> Edits:
    return Edits(
        bf16(device, n, d),
        torch.empty(n, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


@case("rmsnorm")
def _(device: str) -> None:
    for d in (128, 4096, 5120, 8192, 16384):
        x, weight = bf16(device, 512, d), bf16(device, d)
        rmsnorm_steer(x, weight, 1e-5)
        rmsnorm_steer(x, weight, 1e-5, residual=bf16(device, 512, d))


@case("rmsnorm_steer")
def _(device: str) -> None:
    for d in (4096, 8192, 16384):
        x, weight, edits = bf16(device, 512, d), bf16(device, d), table(device, 512, d)
        rmsnorm_steer(x, weight, 1e-5, residual=x, before=edits, after=edits)


@case("rmsnorm_backward")
def _(device: str) -> None:
    for d in (4096, 8192, 16384):
        x, weight, edits = bf16(device, 4096, d), bf16(device, d), table(device, 4096, d)
        rmsnorm_steer_backward(x, x, x, x, x, x, weight, 1e-5, edits, edits, True, True)
        rmsnorm_steer_backward(x, x, x, x, x, x, weight, 1e-5, None, None, True, False)


@case("swiglu")
def _(device: str) -> None:
    gate_up = bf16(device, 512, 2 * 14336)
    swiglu(gate_up)
    swiglu_backward(bf16(device, 512, 14336), gate_up)


def head(device: str, rows: int, d: int, n_ids: int, k: int = 5, **options: Any) -> None:
    """With everything a lens asks for: targets and KL; 33 taps a position."""
    vectors = [torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2)]
    target = Target(torch.empty(rows, dtype=torch.int64, device=device), *vectors)
    given = {"group_size": 33 if rows % 33 == 0 else 1, "target": target} | options
    head_stats(bf16(device, rows, d), bf16(device, n_ids, d), k=k, **given)


def sampled(device: str, n_keyed: int, place: int = 0) -> Noise:
    keys = torch.empty(n_keyed, dtype=torch.int64, device=device)
    return Noise(keys, keys, place=place)


@case("head_few")
def _(device: str) -> None:
    """Steps of decoding: every request's last row is sampled from, at a temperature of its own."""
    head(device, 8, 4096, 16_032, k=64, noise=sampled(device, 8))
    for rows in (32, 128):
        scale = torch.empty(rows, dtype=torch.float32, device=device)
        noise = sampled(device, rows // 8, place=7)
        head(device, rows, 4096, 128_256, noise=noise, group_size=8, scale=scale)
    norm_weight, noise = bf16(device, 4096), sampled(device, 1, place=32)
    head(device, 33, 4096, 128_256, noise=noise, norm_weight=norm_weight, eps=1e-5)


@case("head_many")
def _(device: str) -> None:
    head(device, 4096, 4096, 128_256, target=None)
    head(device, 81 * 64, 8192, 16_032, group_size=81, k=20)


@case("head_odd")
def _(device: str) -> None:
    """Columns that no step divides."""
    for rows in (8, 32, 33, 128, 4096):
        head(device, rows, 608, 16_032, noise=sampled(device, 1) if rows <= 128 else None)


@case("target_logits")
def _(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (8, 32, 33, 128, 4096):
            x, weight = (torch.empty(n, 4096, dtype=dtype, device=device) for n in (rows, 16_032))
            target_logits(x, weight, torch.empty(rows, dtype=torch.int64, device=device))


@case("head_float32")
def _(device: str) -> None:
    for rows in (8, 32, 33, 128, 33 * 64):
        target = Target(
            torch.empty(rows, dtype=torch.int64, device=device),
            *(torch.empty(rows, device=device) for _ in range(2)),
        )
        x, weight = (torch.empty(n, 4096, device=device) for n in (rows, 128_256))
        head_stats(x, weight, k=5, target=target, group_size=33 if rows % 33 == 0 else 1)


@case("decode_attention")
def _(device: str) -> None:
    shapes = (
        (8, 32, 8, 128), (8, 64, 8, 128), (1, 16, 2, 128), (512, 32, 32, 128),
        (8, 9, 3, 64), (4, 32, 2, 128), (2, 64, 1, 128), (2, 16, 8, 256),
    )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        for batch, heads, kv_heads, head_dim in shapes:
            q = torch.empty(batch, heads, head_dim, dtype=dtype, device=device)
            cache = torch.empty(batch, kv_heads, 8192, head_dim, dtype=dtype, device=device)
            decode_attention(q, cache, cache, torch.empty(batch, dtype=torch.int64, device=device))


@case("rope_qk")
def _(device: str) -> None:
    for heads, normed in ((32, False), (64, True)):
        qkv = bf16(device, 8, 1, (heads + 16) * 128)
        cos, sin = (bf16(device, 8, 1, 1, 64) for _ in range(2))
        keys, values = (bf16(device, 8, 8, 8192, 128) for _ in range(2))
        positions = torch.empty(8, 1, dtype=torch.int64, device=device)
        weight = bf16(device, 128) if normed else None
        rope_qk(qkv, cos, sin, keys, values, positions, eps=1e-6, q_weight=weight, k_weight=weight)

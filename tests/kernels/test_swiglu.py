"""swiglu against float64: values, gradients, registration."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_as_good
from torch import Tensor

from shardlens.kernels import implementation, swiglu, swiglu_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, f", [(0, 96), (1, 507), (7, 96), (123, 48), (2, 4096)])
def test_against_float64(rows: int, f: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = torch.randn(rows, 2 * f, device=device, dtype=dtype) * 3
    with implementation("triton"):
        out = swiglu(gate_up)
    assert out.dtype == dtype and out.shape == (rows, f)
    assert_as_good(out, swiglu_reference(gate_up), swiglu_reference(gate_up.double()))


def test_strided_extreme_and_batched(device: torch.device) -> None:
    wide = torch.randn(3, 5, 400, device=device)
    wide[0, 0, :200:3], wide[0, 1, 1:200:3] = 1e4, -1e4
    for gate_up in (wide[..., 50:250], wide[..., ::2], wide.transpose(0, 1)[1:3, :, :200]):
        with implementation("triton"):
            out = swiglu(gate_up)
        assert_as_good(out, swiglu_reference(gate_up), swiglu_reference(gate_up.double()))
    huge = torch.full((1, 192), 1e4, device=device, dtype=torch.bfloat16)
    with implementation("triton"):
        assert torch.equal(swiglu(huge), swiglu_reference(huge))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype, device: torch.device, either: str) -> None:
    gate_up = torch.randn(7, 2 * 507, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(7, 507, device=device, dtype=dtype)

    def gradient(x: Tensor, function: object) -> Tensor:
        (grad,) = torch.autograd.grad(function(x), x, dy.to(x.dtype))  # type: ignore[operator]
        return grad

    truth = gradient(gate_up.detach().double().requires_grad_(), swiglu_reference)
    assert_as_good(gradient(gate_up, swiglu), gradient(gate_up, swiglu_reference), truth)
    expanded = torch.autograd.grad(swiglu(gate_up).sum(), gate_up)[0]
    plain = torch.autograd.grad(swiglu_reference(gate_up).sum(), gate_up)[0]
    exact = gate_up.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(swiglu_reference(exact).sum(), exact)
    assert_as_good(expanded, plain, truth)


def test_gradcheck_and_opcheck(device: torch.device) -> None:
    gate_up = torch.randn(3, 10, device=device, dtype=torch.float64, requires_grad=True)
    with implementation("reference"):
        assert torch.autograd.gradcheck(swiglu, gate_up)
    for name in ("triton", "reference"):
        with implementation(name):
            torch.library.opcheck(
                torch.ops.shardlens.swiglu, (gate_up.detach().float().requires_grad_(),)
            )


def test_odd_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="7 columns"):
        swiglu(torch.zeros(2, 7))

"""linear against float64: in parts, as a convolution, and neither, at odd sizes; gradients."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_as_good
from torch import Tensor

from shardlens.kernels import linear
from shardlens.kernels.few_rows_linear import (
    CONVOLVED_LEAST_WEIGHTS,
    CONVOLVED_MOST_COLUMNS,
    CONVOLVED_ROWS,
    LEAST_WEIGHTS,
    MOST_ROWS,
    PART,
)

module = import_module(
    "shardlens.kernels.few_rows_linear"
)  # the package gives the function that name


def noted(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Gets the shape of x whenever the module's function of that name is called."""
    seen: list[tuple[int, ...]] = []
    product = getattr(module, name)

    def noting(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        out: Tensor = product(x, weight)
        return out

    monkeypatch.setattr(module, name, noting)
    return seen


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Small weights are cut too; the list gets the shape of x of each product in parts."""
    monkeypatch.setattr(module, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(module, "HAS_MKL", True)
    return noted("_in_parts", monkeypatch)


@pytest.fixture
def convolved(cut: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Small weights are convolved too; the list gets the shape of x of each such product."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN, which convolves")
    monkeypatch.setattr(module, "CONVOLVED_LEAST_WEIGHTS", 0)
    return noted("_convolved", monkeypatch)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.is_contiguous()
    assert_as_good(out, F.linear(x, weight, bias), exact)
    return out


def check_convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As good as the K products added in float32 one after another."""
    out = linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    products = x.reshape(-1, 1, x.shape[-1]) * weight
    # not torch.cumsum, which adds in float64 on a CPU
    in_order = torch.from_numpy(np.cumsum(products.numpy(), -1)[..., -1].copy()).view(out.shape)
    assert out.is_contiguous()
    assert_as_good(out, in_order if bias is None else in_order + bias, exact)
    return out


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 17, 40, MOST_ROWS + 1])
@pytest.mark.parametrize("n_out, k", [(509, 48), (1, 7), (127, 48), (128, 7), (129, 48), (256, 1)])
def test_against_float64(rows: int, n_out: int, k: int, has_bias: bool, cut: list[Any]) -> None:
    bias = torch.randn(n_out) if has_bias else None
    check(torch.randn(rows, k), torch.randn(n_out, k), bias)
    assert cut == ([(rows, k)] if 0 < rows <= MOST_ROWS and n_out >= PART else [])


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (2, 0, 48), (1, 1, 1, 48)])
def test_any_leading_dims(shape: tuple[int, ...], cut: list[Any]) -> None:
    out = check(torch.randn(shape), torch.randn(300, 48), torch.randn(300))
    assert out.shape == (*shape[:-1], 300)
    assert len(cut) == (0 not in shape)


def test_strided_inputs(cut: list[Any]) -> None:
    wide, tall = torch.randn(6, 5, 200), torch.randn(300, 600)
    weight, bias = torch.randn(300, 48), torch.randn(600)[::2]
    xs = (
        wide[..., 7:55],
        wide[..., ::4][..., :48],
        wide[:, 1, :48],
        wide.transpose(0, 1)[..., :48],
    )
    for x in (*xs, torch.randn(48).expand(5, 48), torch.randn(48, 9).T):
        check(x, weight, bias)
        for strided in (tall[:, 100:148], tall[::2, :48]):
            check(x, strided)
    assert len(cut) == 18
    check(wide[..., :48], tall[:48].T)  # a weight without adjacent columns is left as it is
    check(wide[..., :48], tall[:, ::2][:, :48])
    assert len(cut) == 18


def test_a_large_weight_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the true bounds. One part of it left out, or two exchanged, would show."""
    calls: list[Any] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: calls.append(given) or bmm(*given))
    x, weight = torch.randn(4, 300), torch.randn(LEAST_WEIGHTS // 300 + 1, 300)
    check(x, weight)
    assert len(calls) == torch.backends.mkl.is_available()
    linear(x, weight[:-1])
    linear(x.double(), weight.double())
    linear(x.bfloat16(), weight.bfloat16())
    assert len(calls) == torch.backends.mkl.is_available()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 17, 31, 32, 33])
@pytest.mark.parametrize("n_out, k", [(509, 48), (128, 1), (129, 2048), (300, 7)])
def test_convolved_against_float64(
    rows: int, n_out: int, k: int, has_bias: bool, cut: list[Any], convolved: list[Any]
) -> None:
    bias = torch.randn(n_out) if has_bias else None
    is_convolved = rows in CONVOLVED_ROWS
    checking = check_convolved if is_convolved else check
    checking(torch.randn(rows, k), torch.randn(n_out, k), bias)
    assert (convolved, cut) == (([(rows, k)], []) if is_convolved else ([], [(rows, k)]))


def test_convolved_strides(convolved: list[Any]) -> None:
    """Rows of x may lie anyhow; a weight is convolved only as it lies in a file."""
    wide, tall = torch.randn(6, 5, 200), torch.randn(300, 600)
    weight = torch.randn(300, 48)
    for x in (wide[..., 7:55], wide[..., ::4][..., :48], wide.transpose(0, 1)[..., :48]):
        assert check_convolved(x, weight).shape == (*x.shape[:-1], 300)
    for x in (torch.randn(48).expand(5, 48), torch.randn(48, 9).T, torch.randn(48, 16).T):
        check_convolved(x, weight)
    check_convolved(wide[:, 1, :48], weight[20:280])  # a rank's or a block's rows
    assert len(convolved) == 7
    check(wide[..., :48], tall[:, 100:148])
    check(wide[..., :48], tall[::2, :48])
    check(torch.randn(5, CONVOLVED_MOST_COLUMNS + 1), torch.randn(200, CONVOLVED_MOST_COLUMNS + 1))
    assert len(convolved) == 7


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN, which convolves")
def test_a_large_weight_is_convolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the true bounds."""
    calls: list[Any] = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *given: calls.append(given) or conv2d(*given))
    x, weight = torch.randn(5, 600), torch.randn(CONVOLVED_LEAST_WEIGHTS // 600 + 1, 600)
    check_convolved(x, weight)
    assert len(calls) == torch.backends.mkl.is_available()
    linear(x, weight[:-1])
    assert len(calls) == torch.backends.mkl.is_available()


def test_gradients_flow(cut: list[Any]) -> None:
    x, weight, bias = torch.randn(3, 48), torch.randn(300, 48), torch.randn(300)
    for needing in ((x,), (weight,), (bias,), (x, weight, bias)):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(any(tensor is other for other in needing))
        ours, plain = (
            torch.autograd.grad(f(x, weight, bias).sin().sum(), needing) for f in (linear, F.linear)
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert not cut
    with torch.no_grad():
        check(x, weight, bias)
    assert cut


def test_compiled(cut: list[Any]) -> None:
    x, weight = torch.randn(3, 48), torch.randn(300, 48)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), F.linear(x, weight))
    assert not cut


def test_shapes_that_do_not_fit_are_refused(cut: list[Any]) -> None:
    with pytest.raises(RuntimeError):
        linear(torch.randn(3, 47), torch.randn(300, 48))
    with pytest.raises(RuntimeError):
        linear(torch.randn(3, 48), torch.randn(300, 48), torch.randn(299))

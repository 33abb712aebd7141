"""rmsnorm_steer against float64: every edit, values and gradients, registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assert_as_good
from tolerances import EFFECT, GRADIENT_RELATIVE, KERNEL_EPS
from torch import Tensor

from shardlens.kernels import MODES, Edits, implementation, rmsnorm_steer, rmsnorm_steer_reference

EPS = 1e-5
TABLE = 6  # one vector for each mode, one more, and one of zeros


def edits_of(rows: int, d: int, dtype: torch.dtype, device: torch.device, seed: int) -> Edits:
    """Rows take every vector in turn, and none (-1, and an index beyond the table)."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(TABLE, d, generator=generator)
    vectors[-1] = 0
    choices = torch.tensor([0, 1, 2, 3, -1, 4, 5, TABLE])
    return Edits(
        vectors.to(device, dtype),
        torch.tensor([0, 1, 2, 3, 2, 3], dtype=torch.int32, device=device),
        choices[(torch.arange(rows) + seed) % len(choices)].to(device),
        (torch.randn(rows, generator=generator) * 2).to(device),
    )


def wider(edits: Edits | None) -> Edits | None:
    if edits is None:
        return None
    return Edits(edits.vectors.double(), edits.modes, edits.index, edits.scale.double())


def truth_of(x: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """In float64, written out anew, without rounding on the way."""

    def edit(a: Tensor, edits: Edits | None) -> Tensor:
        if edits is None:
            return a
        rows = []
        for row, index, s in zip(a, edits.index.tolist(), edits.scale.double(), strict=True):
            if 0 <= index < TABLE:
                v = edits.vectors[index].double()
                u = v / v.norm() if v.norm() > 0 else v
                mode = MODES[int(edits.modes[index])]
                added = row + s * v
                row = {
                    "add": added,
                    "ablate": row - s * (row @ u) * u,
                    "clamp": row - (row @ u) * u + s * u,
                    "add_keep_norm": added * row.norm() / added.norm(),
                }[mode]
            rows.append(row)
        return torch.stack(rows) if rows else a

    h = x.double() if options.get("residual") is None else x.double() + options["residual"].double()
    h = edit(h, options.get("before"))
    y = h / (h.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return edit(y, options.get("after")), h


CASES = ["plain", "residual", "before", "after", "all"]


def options_of(
    case: str, rows: int, d: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if case in ("residual", "all"):
        options["residual"] = torch.randn(rows, d, device=device).to(dtype)
    if case in ("before", "all"):
        options["before"] = edits_of(rows, d, dtype, device, 0)
    if case in ("after", "all"):
        options["after"] = edits_of(rows, d, dtype, device, 3)
    return options


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, d", [(0, 96), (1, 4096), (7, 507), (123, 96), (2, 16384)])
def test_against_float64(
    case: str, rows: int, d: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = torch.randn(rows, d, device=device).to(dtype), torch.rand(d, device=device) + 0.5
    weight, options = weight.to(dtype), options_of(case, rows, d, dtype, device)
    with implementation("triton"):
        y, h = rmsnorm_steer(x, weight, EPS, **options)
    plain_y, plain_h = rmsnorm_steer_reference(x, weight, EPS, **options)
    true_y, true_h = truth_of(x, weight, **options)
    assert_as_good(y, plain_y, true_y)
    assert_as_good(h, plain_h, true_h)


@pytest.mark.parametrize("mode", range(len(MODES)))
def test_each_mode_has_a_different_effect(mode: int, device: torch.device, either: str) -> None:
    """An edit that was left out, or was of another mode, misses by far."""
    x, weight = torch.randn(3, 96, device=device), torch.ones(96, device=device)
    results = []
    for used in (mode, *(other for other in range(len(MODES)) if other != mode)):
        edits = edits_of(3, 96, x.dtype, device, 0)
        edits.modes.fill_(used)
        edits.index.zero_()
        results.append(rmsnorm_steer(x, weight, EPS, before=edits)[1])
    tolerance = KERNEL_EPS * torch.finfo(torch.float32).eps * x.abs().max()
    for other in (x, *results[1:]):
        assert (results[0] - other).abs().max() > EFFECT * tolerance


def test_rows_without_an_edit_are_those_of_the_plain_norm(
    device: torch.device, either: str
) -> None:
    x, weight = torch.randn(9, 507, device=device).bfloat16(), torch.ones(507, device=device)
    weight = weight.bfloat16()
    edits = edits_of(9, 507, x.dtype, device, 0)
    edits.index[1::2] = -1
    y, h = rmsnorm_steer(x, weight, EPS, before=edits, after=edits)
    plain, same = rmsnorm_steer(x, weight, EPS)
    assert same is x and torch.equal(h[1::2], x[1::2]) and torch.equal(y[1::2], plain[1::2])
    assert not torch.equal(y[::2], plain[::2])


def test_strided_rows_and_a_capture_buffer(device: torch.device, either: str) -> None:
    """Every second row of a wider tensor, its state written to one slot of a buffer."""
    wide = torch.randn(14, 3, 400, device=device)
    x, residual = wide[::2, 1, 100:300], wide[1::2, 0, :200]
    weight = torch.rand(400, device=device)[::2]
    buffer = torch.full((7, 4, 200), 7.0, device=device)
    y, h = rmsnorm_steer(x, weight, EPS, residual=residual, h_out=buffer[:, 2])
    assert h.data_ptr() == buffer[:, 2].data_ptr()
    true_y, true_h = truth_of(x, weight, residual=residual)
    plain_y, plain_h = rmsnorm_steer_reference(x, weight, EPS, residual=residual)
    assert_as_good(y, plain_y, true_y)
    assert_as_good(buffer[:, 2], plain_h, true_h)
    assert (buffer[:, [0, 1, 3]] == 7).all()
    rmsnorm_steer(x, weight, EPS, h_out=buffer[:, 0])
    assert torch.equal(buffer[:, 0], x)
    edits = edits_of(7, 200, x.dtype, device, 0)
    strided = Edits(
        edits.vectors.T.contiguous().T,
        *(t[:, None].repeat(1, 2)[:, 0] for t in (edits.modes, edits.index, edits.scale)),
    )
    assert not any(t.is_contiguous() for t in vars(strided).values())
    for ours, plain in zip(
        rmsnorm_steer(x, weight, EPS, before=strided),
        rmsnorm_steer(x, weight, EPS, before=edits),
        strict=True,
    ):
        assert torch.equal(ours, plain)
    apart = wide[:, 0, ::2]
    assert_as_good(
        rmsnorm_steer(apart, weight, EPS)[0],
        rmsnorm_steer_reference(apart, weight, EPS)[0],
        truth_of(apart, weight)[0],
    )


def test_large_values_in_bf16(device: torch.device) -> None:
    x = (torch.randn(5, 4096, device=device) * 1e4).bfloat16()
    x[0, 0], x[1] = 3e4, 0
    weight = torch.ones(4096, device=device).bfloat16()
    options = options_of("all", 5, 4096, torch.bfloat16, device)
    with implementation("triton"):
        y, h = rmsnorm_steer(x, weight, EPS, **options)
    plain_y, plain_h = rmsnorm_steer_reference(x, weight, EPS, **options)
    true_y, true_h = truth_of(x, weight, **options)
    assert_as_good(h, plain_h, true_h)
    assert_as_good(y, plain_y, true_y)


def gradients(
    case: str, dtype: torch.dtype, device: torch.device, function: Any, rows: int = 11, d: int = 70
) -> list[Tensor]:
    """Gradients to x, residual, weight, vectors and scales, whichever the case has."""
    torch.manual_seed(1)
    x = torch.randn(rows, d).to(device, dtype).requires_grad_()
    weight = (torch.rand(d) + 0.5).to(device, dtype).requires_grad_()
    options = options_of(case, rows, d, dtype, device)
    inputs = [x, weight]
    if "residual" in options:
        inputs.append(options["residual"].requires_grad_())
    for name in ("before", "after"):
        if name in options:
            edits = options[name]
            if dtype == torch.float64:
                edits = options[name] = wider(edits)
            inputs += [edits.vectors.requires_grad_(), edits.scale.requires_grad_()]
    dy = torch.randn(rows, d).to(device, dtype)
    dh = torch.randn(rows, d).to(device, dtype)
    y, h = function(x, weight, EPS, **options)
    return list(torch.autograd.grad((y, h), inputs, (dy, dh)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows, d", [(11, 70), (20, 9000)])  # rows of 9000 are walked in parts
def test_gradients_against_float64_autograd(
    case: str, rows: int, d: int, device: torch.device, either: str
) -> None:
    truth = gradients(case, torch.float64, device, rmsnorm_steer_reference, rows, d)
    ours_of_all = gradients(case, torch.float32, device, rmsnorm_steer, rows, d)
    for ours, true in zip(ours_of_all, truth, strict=True):
        assert (ours - true).abs().max() <= GRADIENT_RELATIVE * true.abs().max()


@pytest.mark.parametrize("case", ["plain", "residual"])
def test_bf16_gradients(case: str, device: torch.device, either: str) -> None:
    """To x and the residual; those of vectors sum over rows and are checked in float32."""

    def truth(x: Tensor, weight: Tensor, eps: float, **options: Any) -> tuple[Tensor, Tensor]:
        wide = {name: value.double() for name, value in options.items()}
        return rmsnorm_steer_reference(x.double(), weight.double(), eps, **wide)

    ours = gradients(case, torch.bfloat16, device, rmsnorm_steer)
    plain = gradients(case, torch.bfloat16, device, rmsnorm_steer_reference)

    def exact(x: Tensor, weight: Tensor, eps: float, **options: Any) -> tuple[Tensor, Tensor]:
        y, h = truth(x, weight, eps, **options)
        return y.bfloat16(), h.bfloat16()  # so that gradients come in as bf16

    true = gradients(case, torch.bfloat16, device, exact)
    error, allowed = ((grad[0].double() - true[0].double()).abs() for grad in (ours, plain))
    assert error.mean() <= allowed.mean() * 1.05 + 1e-6


def test_only_h_is_used(device: torch.device, either: str) -> None:
    """A gradient that comes through h alone, and one through an expanded dy."""
    x = torch.randn(5, 96, device=device, requires_grad=True)
    residual = torch.randn(5, 96, device=device, requires_grad=True)
    weight = torch.ones(96, device=device, requires_grad=True)
    _, h = rmsnorm_steer(x, weight, EPS, residual=residual)
    dx, dresidual = torch.autograd.grad(h.sum(), (x, residual))
    assert (dx == 1).all() and (dresidual == 1).all()
    y, _ = rmsnorm_steer(x, weight, EPS)
    plain, _ = rmsnorm_steer_reference(x, weight, EPS)
    for ours, other in zip(
        torch.autograd.grad(y.sum(), (x, weight)),
        torch.autograd.grad(plain.sum(), (x, weight)),
        strict=True,
    ):
        assert torch.allclose(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_of_the_reference(case: str, device: torch.device) -> None:
    rows, d = 8, 5
    x = torch.randn(rows, d, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.rand(d, dtype=torch.float64, device=device, requires_grad=True)
    options = options_of(case, rows, d, torch.float64, device)
    names = [name for name in ("before", "after") if name in options]
    tables = [wider(options[name]) for name in names]
    residual = options.get("residual")
    extra = [] if residual is None else [residual.requires_grad_()]
    # a vector of zeros has no direction, and so no gradient to check
    moving = [
        tensor.detach().requires_grad_()
        for table in tables
        for tensor in (table.vectors[:-1], table.scale)
    ]

    def run(x: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        parts = list(rest)
        given: dict[str, Any] = {} if residual is None else {"residual": parts.pop(0)}
        for name, table in zip(names, tables, strict=True):
            vectors, scale = torch.cat((parts.pop(0), table.vectors[-1:])), parts.pop(0)
            given[name] = Edits(vectors, table.modes, table.index, scale)
        return rmsnorm_steer(x, weight, EPS, **given)

    with implementation("reference"):
        assert torch.autograd.gradcheck(run, (x, weight, *extra, *moving))


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("case", ["plain", "residual", "all"])
def test_opcheck(name: str, case: str, device: torch.device) -> None:
    x, weight = torch.randn(5, 32, device=device), torch.rand(32, device=device)
    options = options_of(case, 5, 32, x.dtype, device)

    def flat(edits: Edits | None) -> list[Tensor]:
        if edits is None:
            return []
        vectors, scale = (t.clone().requires_grad_() for t in (edits.vectors, edits.scale))
        return [vectors, edits.modes, edits.index, scale]

    tables = (flat(options.get("before")), flat(options.get("after")))
    shared = (x.requires_grad_(), options.get("residual"), weight.requires_grad_(), EPS)
    with implementation(name):
        torch.library.opcheck(torch.ops.shardlens.rmsnorm_steer, (*shared, *tables))
        into = (torch.empty_like(x), *(t.detach() if isinstance(t, Tensor) else t for t in shared))
        plain = tuple([t.detach() for t in table] for table in tables)
        torch.library.opcheck(torch.ops.shardlens.rmsnorm_steer_into, (*into, *plain))


def test_refusals(device: torch.device) -> None:
    x, weight = torch.randn(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match="16384"):
        rmsnorm_steer(torch.zeros(1, 16385, device=device), weight, EPS)
    with pytest.raises(ValueError, match="weight has shape"):
        rmsnorm_steer(x, weight[:7], EPS)
    with pytest.raises(ValueError, match="residual must have"):
        rmsnorm_steer(x, weight, EPS, residual=x[:1])
    with pytest.raises(ValueError, match="h_out must have"):
        rmsnorm_steer(x, weight, EPS, h_out=x.bfloat16())
    with pytest.raises(ValueError, match=r"edits.index has shape \[3\], it needs \[2\]"):
        rmsnorm_steer(x, weight, EPS, before=edits_of(3, 8, x.dtype, device, 0))
    with pytest.raises(ValueError, match="h_out passes no gradient"):
        rmsnorm_steer(x.requires_grad_(), weight, EPS, h_out=torch.empty_like(x))

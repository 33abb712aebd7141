"""The head without logits: top-k, log-sum-exp, entropy, rank, KL and samples of R rows.

What is computed, and its reference, are in `head_stats_reference.py`; the kernels are in
`head_stats_kernel.py`; here they are launched and registered. Two regimes:

few rows   (up to 128, decode): one tile of rows; every program streams its own share of the
           slice's weight, which is read once and bounds the speed: Vs · d · 2 bytes in bf16.
many rows  (prefill): tiles of 128 rows times a few shares; bound by the matrix units,
           2 · R · Vs · d operations. Where the GPU has bulk tensor loads, they feed the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .dispatch import use_triton
from .head_cut import MOST_K, TILE_ROWS, Cut, cut, tile_width
from .head_stats_kernel import N_SUMS, dot_precision, head_kernel, merge_kernel
from .head_stats_reference import (
    HeadStats,
    Noise,
    Target,
    check_groups,
    empty_stats,
    head_stats_reference,
)
from .launch import Chip, Config, chip_of, choose, launch
from .rmsnorm_steer import rmsnorm_reference
from .triton_shim import triton

# Left without a number, the assembler at times aims lower, for more programs at once, and spills.
MOST_REGISTERS = 255


def has_bulk_loads(chip: Chip, *tensors: Tensor) -> bool:
    """Whether the GPU's tensor memory accelerator can feed a product with these matrices."""
    return chip.has_wide_products and all(
        t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def runs_kernel(x: Tensor, weight: Tensor, k: int) -> bool:
    """Whether rows x meet `weight` in the kernel, or in the reference."""
    is_served = k <= MOST_K and x.dtype == weight.dtype and x.dtype != torch.float64
    return use_triton(x) and is_served


def cut_of(x: Tensor, weight: Tensor, k: int, group_size: int) -> Cut:
    """How the kernel is cut for these rows, of which there are some, and this slice."""
    chip = chip_of(x.device)
    bulk = has_bulk_loads(chip, x, weight)
    return cut(x.shape[0], weight.shape[0], group_size, k, x.dtype, chip, bulk)


def _launch(
    x: Tensor,
    weight: Tensor,
    k: int,
    first_id: int,
    scale: Tensor | None,
    target: Target | None,
    group_size: int,
    noise: Noise | None,
    norm_weight: Tensor | None,
    eps: float,
) -> HeadStats:
    """The kernels on rows x [R, d] whose groups fit a tile; noise only up to TILE_ROWS rows."""
    n_keyed, n_best = (0, 0) if noise is None else (noise.seed.shape[0], noise.n_best)
    out = empty_stats(x.shape[0], n_keyed, n_best, k, x.device)
    if x.shape[0] and weight.shape[0]:
        work = cut_of(x, weight, k, group_size)
        run = partial(
            _run, out, work, x, weight, first_id, scale, target, group_size, noise, norm_weight, eps
        )
        key = (
            "head_stats", x.shape[0] > TILE_ROWS, triton.next_power_of_2(x.shape[0]),
            tuple(weight.shape), x.dtype, k, target is None, group_size > 1,
            noise is None, norm_weight is None,
        )  # fmt: skip
        run(choose(key, x.device, work.configs, run))
    return out


def _run(
    out: HeadStats,
    work: Cut,
    x: Tensor,
    weight: Tensor,
    first_id: int,
    scale: Tensor | None,
    target: Target | None,
    group_size: int,
    noise: Noise | None,
    norm_weight: Tensor | None,
    eps: float,
    config: Config,
) -> None:
    (n_rows, d), n_ids = x.shape, weight.shape[0]
    rows, ids, columns, part, wants_bulk = config.tile
    k = out.values.shape[1]
    n_keyed, n_best = out.key_ids.shape
    seed, step = (None, None) if noise is None else (noise.seed, noise.step)
    key_place = 0 if noise is None else noise.place

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x.device)

    k_2, n_2 = triton.next_power_of_2(k), triton.next_power_of_2(max(1, n_best))
    winners = (floats(work.shares, n_rows, k_2), ints(work.shares, n_rows, k_2))
    sums = floats(work.shares, n_rows, N_SUMS)
    keys = tuple(make(work.shares, n_keyed, n_2) for make in (floats, ints, floats))
    width = tile_width(config)
    tiles = floats(work.programs, rows, width)
    bulk = bool(wants_bulk)
    launch(
        head_kernel,
        (work.programs,),
        _described(x, [rows, columns], bulk), _described(weight, [ids, columns], bulk),
        norm_weight, _adjacent(scale), *_target_arguments(target, first_id),
        _adjacent(seed), _adjacent(step),
        *winners, sums, *keys, tiles,
        n_rows, n_ids, d, x.stride(0), weight.stride(0),
        0 if norm_weight is None else norm_weight.stride(0),
        work.pieces, work.share, work.tile_rows, work.row_tiles,
        group_size, n_keyed, key_place, first_id, eps,
        K=k, K2=k_2, N=n_best, N2=n_2, BB=min(rows, triton.next_power_of_2(max(1, n_keyed))),
        BR=rows, BV=ids, BD=columns, BP=min(part, width), HALVES=ids // width,
        EVEN_D=d % columns == 0, BULK=bulk, NORMED=norm_weight is None, SCALED=scale is not None,
        TARGET=target is not None, GROUPED=group_size > 1, NOISE=n_keyed > 0,
        PRECISION=dot_precision(x.dtype),
        num_warps=config.warps, num_stages=config.stages, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    launch(
        merge_kernel,
        (n_rows,),
        *winners, sums, *keys,
        *vars(out).values(),
        n_rows, n_keyed, work.shares, group_size, first_id,
        K=k, K2=k_2, N=n_best, N2=n_2, S2=triton.next_power_of_2(work.shares), NOISE=n_keyed > 0,
        num_warps=2, maxnreg=MOST_REGISTERS,
    )  # fmt: skip


def _adjacent(row_values: Tensor | None) -> Tensor | None:
    return None if row_values is None else row_values.contiguous()


def _described(matrix: Tensor, block: list[int], bulk: bool) -> Any:
    if not bulk:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, block)


def _target_arguments(target: Target | None, first_id: int) -> tuple[Tensor | None, ...]:
    """(local ids, lower and upper bound of logits that tie with the target's)."""
    if target is None:
        return None, None, None
    # ids of other slices stay on their side of this one's
    local = (target.ids - first_id).clamp(-1, 2**31 - 1).to(torch.int32)
    return local, target.logits - target.slack, target.logits + target.slack


def _in_pieces(n_rows: int, group_size: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Rows for groups longer than a tile: (index of rows in order, places of the originals, size).

    Each group becomes pieces of up to TILE_ROWS rows, each with the reference row as its last.
    """
    others = group_size - 1
    n_pieces = triton.cdiv(others, TILE_ROWS - 1)
    per_piece = triton.cdiv(others, n_pieces)
    place = torch.arange(n_pieces * (per_piece + 1), device=device).view(n_pieces, -1)
    piece = torch.arange(n_pieces, device=device)[:, None]
    in_group = (piece * per_piece + place % (per_piece + 1)).clamp(max=others)
    in_group[:, -1] = others
    groups = torch.arange(n_rows // group_size, device=device)[:, None]
    index = (groups * group_size + in_group.flatten()).flatten()
    at = torch.arange(others, device=device)
    at = torch.cat((at // per_piece * (per_piece + 1) + at % per_piece, place[-1:, -1]))
    places = (groups * place.numel() + at).flatten()
    return index, places, per_piece + 1


def _forward(
    x: Tensor,
    weight: Tensor,
    k: int,
    first_id: int,
    scale: Tensor | None,
    target: Target | None,
    group_size: int,
    noise: Noise | None,
    norm_weight: Tensor | None,
    eps: float,
) -> HeadStats:
    if not runs_kernel(x, weight, k):
        x = x if norm_weight is None else rmsnorm_reference(x, norm_weight, eps)
        return head_stats_reference(
            x, weight, k=k, first_id=first_id, scale=scale, target=target,
            group_size=group_size, noise=noise,
        )  # fmt: skip
    x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight))
    run = partial(_launch, weight=weight, first_id=first_id, norm_weight=norm_weight, eps=eps)
    if group_size > TILE_ROWS:
        index, places, size = _in_pieces(x.shape[0], group_size, x.device)
        stats = run(
            x[index], k=k, scale=None if scale is None else scale[index],
            target=None if target is None else target.rows(index), group_size=size, noise=None,
        )  # fmt: skip
        stats = HeadStats(
            **{
                name: value if name.startswith("key_") else value[places]
                for name, value in vars(stats).items()
            }
        )
    else:
        with_noise = noise if x.shape[0] <= TILE_ROWS else None
        stats = run(x, k=k, scale=scale, target=target, group_size=group_size, noise=with_noise)
        if with_noise is noise:
            return stats
    if noise is None:
        return stats
    # Rows to sample from are few; the kernel for many rows has no room for noise.
    sampled = noise.of_rows(x, group_size)
    sampled_scale = None if scale is None else noise.of_rows(scale, group_size)
    parts = []
    for start in range(0, noise.seed.shape[0], TILE_ROWS):
        rows = slice(start, min(noise.seed.shape[0], start + TILE_ROWS))
        keyed = Noise(noise.seed[rows], noise.step[rows], noise.n_best)  # each a group of its own
        own_scale = None if sampled_scale is None else sampled_scale[rows]
        parts.append(
            run(sampled[rows], k=1, scale=own_scale, target=None, group_size=1, noise=keyed)
        )
    for name in ("key_values", "key_ids", "key_logits"):
        setattr(stats, name, torch.cat([getattr(part, name) for part in parts]))
    return stats


@torch.library.custom_op("shardlens::head_stats", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    k: int,
    first_id: int,
    scale: Tensor | None,
    target: Sequence[Tensor],
    group_size: int,
    noise: Sequence[Tensor],
    n_best: int,
    place: int,
    norm_weight: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """`head_stats` with its target and noise as lists of tensors, empty for none."""
    own_target = Target(*target) if target else None
    own_noise = Noise(noise[0], noise[1], n_best, place) if noise else None
    stats = _forward(
        x, weight, k, first_id, scale, own_target, group_size, own_noise, norm_weight, eps
    )
    return list(vars(stats).values())


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    k: int,
    first_id: int,
    scale: Tensor | None,
    target: Sequence[Tensor],
    group_size: int,
    noise: Sequence[Tensor],
    n_best: int,
    place: int,
    norm_weight: Tensor | None,
    eps: float,
) -> list[Tensor]:
    n_keyed = noise[0].shape[0] if noise else 0
    stats = empty_stats(x.shape[0], n_keyed, n_best if noise else 0, k, x.device)
    return list(vars(stats).values())


def head_stats(
    x: Tensor,
    weight: Tensor,
    *,
    k: int,
    first_id: int = 0,
    scale: Tensor | None = None,
    target: Target | None = None,
    group_size: int = 1,
    noise: Noise | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> HeadStats:
    """Statistics of the logits x · weightᵀ of R rows over a slice of the vocabulary.

    x [R, d], weight [Vs, d] of one dtype (float32, bfloat16, float16), sums in float32; ids are
    counted from first_id. k: winners; above MOST_K the reference runs. scale [R] float32 multiplies
    each row's logits first. target, noise: see `Target`, `Noise`. group_size: rows come in groups
    of this many, the last of which KL is measured from. norm_weight [d]: rows are un-normed, and
    the RMSNorm with `eps` is applied on the way, 1/rms to the products. Not differentiable.
    Raises ValueError for k below 1, shapes that do not fit, or broken groups.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"rows {list(x.shape)} and weight {list(weight.shape)} do not fit")
    if k < 1:
        raise ValueError(f"k of {k} is below 1")
    check_groups(x.shape[0], group_size, noise)
    if not torch.compiler.is_compiling():  # nothing here has a gradient
        return _forward(x, weight, k, first_id, scale, target, group_size, noise, norm_weight, eps)
    flat_target = [] if target is None else [target.ids, target.logits, target.slack]
    flat_noise, n_best, place = [], 0, 0
    if noise is not None:
        flat_noise, n_best, place = [noise.seed, noise.step], noise.n_best, noise.place
    found = torch.ops.shardlens.head_stats(
        x, weight, k, first_id, scale, flat_target, group_size, flat_noise, n_best, place,
        norm_weight, eps,
    )  # fmt: skip
    return HeadStats(*found)

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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import HEAD_TILE_ROWS
from .dispatch import use_triton
from .head_cut import MOST_K, Cut, cut, in_pieces, tile_width
from .head_stats_kernel import N_SUMS, dot_precision, head_kernel, merge_kernel
from .head_stats_reference import stream_head
from .head_types import HeadOptions, HeadStats, Noise, RowStats, SampleStats, Target
from .launch import Chip, Config, chip_of, choose, launch
from .triton_shim import triton

# Without maxnreg, ptxas at times aims lower, for more programs at once, and spills.
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


def cut_of(x: Tensor, weight: Tensor, k: int, rows_per_request: int) -> Cut:
    """How the kernel is cut for these rows, of which there is at least one, and this slice."""
    chip = chip_of(x.device)
    bulk = has_bulk_loads(chip, x, weight)
    return cut(x.shape[0], weight.shape[0], rows_per_request, k, x.dtype, chip, bulk)


@dataclass(frozen=True)
class _Parts:
    """The candidates and sums of each share of the slice, which `merge_kernel` merges."""

    logits: Tensor  # [S, R, K2] float32
    ids: Tensor  # [S, R, K2] int32
    sums: Tensor  # [S, R, N_SUMS]
    samples: tuple[Tensor | None, ...]  # keys, ids, logits [S, B, N2]; None without noise

    @classmethod
    def empty(cls, out: HeadStats, shares: int) -> _Parts:
        def new(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            size = triton.next_power_of_2(like.shape[1])
            return torch.empty(shares, like.shape[0], size, dtype=dtype, device=like.device)

        logits = out.rows.logits
        shape = (shares, logits.shape[0], N_SUMS)
        sums = torch.empty(shape, dtype=torch.float32, device=logits.device)
        samples: tuple[Tensor | None, ...] = (None, None, None)
        if out.samples is not None:
            keys = out.samples.keys
            samples = (new(keys), new(keys, torch.int32), new(keys))
        return cls(new(logits), new(logits, torch.int32), sums, samples)


def _launch(x: Tensor, weight: Tensor, options: HeadOptions) -> HeadStats:
    """The kernels on rows x [R, d] whose requests fit a tile; with noise, all rows fit one tile."""
    out = HeadStats.empty(x.shape[0], options, x.device)
    if x.shape[0] and weight.shape[0]:
        work = cut_of(x, weight, options.k, options.rows_per_request)
        run = partial(_run, out, work, x, weight, options)
        key = (
            "head_stats", x.shape[0] > HEAD_TILE_ROWS, triton.next_power_of_2(x.shape[0]),
            tuple(weight.shape), x.dtype, options.k, options.target is None,
            options.rows_per_request > 1, options.noise is None,
        )  # fmt: skip
        run(choose(key, x.device, work.configs, run))
    return out


def _run(
    out: HeadStats, work: Cut, x: Tensor, weight: Tensor, options: HeadOptions, config: Config
) -> None:
    parts = _Parts.empty(out, work.shares)
    _run_shares(parts, work, x, weight, options, config)
    _merge_shares(out, parts, work, options)


def _run_shares(
    parts: _Parts, work: Cut, x: Tensor, weight: Tensor, options: HeadOptions, config: Config
) -> None:
    (n_rows, d), n_ids = x.shape, weight.shape[0]
    rows, ids, columns, part, wants_bulk = config.tile
    noise = options.noise
    n_samples, n_best = _sample_shape(noise)
    seed, step = (None, None) if noise is None else (noise.seed, noise.step)
    width = tile_width(config)
    tiles = torch.empty(work.programs, rows, width, dtype=torch.float32, device=x.device)
    bulk = bool(wants_bulk)
    launch(
        head_kernel,
        (work.programs,),
        _described(x, [rows, columns], bulk), _described(weight, [ids, columns], bulk),
        _adjacent(options.scale), *_target_arguments(options.target, options.first_id),
        _adjacent(seed), _adjacent(step),
        parts.logits, parts.ids, parts.sums, *parts.samples, tiles,
        n_rows, n_ids, d, x.stride(0), weight.stride(0),
        work.pieces, work.share, work.tile_rows, work.row_tiles, options.rows_per_request,
        n_samples, 0 if noise is None else noise.sample_row, options.first_id,
        K=options.k, K2=parts.logits.shape[2], N=n_best, N2=triton.next_power_of_2(max(1, n_best)),
        BB=min(rows, triton.next_power_of_2(max(1, n_samples))),
        BR=rows, BV=ids, BD=columns, BP=min(part, width), HALVES=ids // width,
        EVEN_D=d % columns == 0, BULK=bulk, SCALED=options.scale is not None,
        TARGET=options.target is not None, KL=options.rows_per_request > 1,
        NOISE=n_samples > 0, PRECISION=dot_precision(x.dtype),
        num_warps=config.warps, num_stages=config.stages, maxnreg=MOST_REGISTERS,
    )  # fmt: skip


def _merge_shares(out: HeadStats, parts: _Parts, work: Cut, options: HeadOptions) -> None:
    rows, samples = out.rows, out.samples
    n_samples, n_best = _sample_shape(options.noise)
    best: tuple[Tensor | None, ...] = (None, None, None)
    if samples is not None:
        best = (samples.token_ids, samples.logits, samples.keys)
    launch(
        merge_kernel,
        (rows.max.shape[0],),
        parts.logits, parts.ids, parts.sums, *parts.samples,
        rows.token_ids, rows.logits, rows.max, rows.sum_exp, rows.sum_dev, rows.cross,
        rows.target_logit, rows.target_rank,
        *best,
        rows.max.shape[0], n_samples, work.shares, options.rows_per_request, options.first_id,
        K=options.k, K2=parts.logits.shape[2], N=n_best, N2=triton.next_power_of_2(max(1, n_best)),
        S2=triton.next_power_of_2(work.shares), NOISE=n_samples > 0,
        num_warps=2, maxnreg=MOST_REGISTERS,
    )  # fmt: skip


def _sample_shape(noise: Noise | None) -> tuple[int, int]:
    """(sampled rows, candidates of each)."""
    return (0, 0) if noise is None else (noise.seed.shape[0], noise.n_best)


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


def _launch_in_pieces(x: Tensor, weight: Tensor, options: HeadOptions) -> RowStats:
    """The kernels on requests longer than a tile."""
    index, inverse, size = in_pieces(x.shape[0], options.rows_per_request, x.device)
    pieces = replace(options.without_noise(index), rows_per_request=size)
    return _launch(x[index], weight, pieces).rows.rows(inverse)


def _launch_samples(x: Tensor, weight: Tensor, options: HeadOptions, noise: Noise) -> SampleStats:
    """The samples alone: their rows are few, and the kernel for many rows has no room for noise."""
    size = options.rows_per_request
    rows = noise.sampled(x, size)
    scale = None if options.scale is None else noise.sampled(options.scale, size)
    parts = []
    for start in range(0, max(1, len(rows)), HEAD_TILE_ROWS):
        block = slice(start, start + HEAD_TILE_ROWS)
        block_options = HeadOptions(
            k=1,
            first_id=options.first_id,
            scale=None if scale is None else scale[block],
            noise=Noise(noise.seed[block], noise.step[block], noise.n_best),
        )
        samples = _launch(rows[block], weight, block_options).samples
        assert samples is not None
        parts.append(samples)
    return SampleStats.joined(parts)


def _forward(x: Tensor, weight: Tensor, options: HeadOptions) -> HeadStats:
    if not runs_kernel(x, weight, options.k):
        return stream_head(x, weight, options)
    x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight))
    noise = options.noise
    if options.rows_per_request > HEAD_TILE_ROWS:
        rows = _launch_in_pieces(x, weight, options)
    elif noise is None or x.shape[0] <= HEAD_TILE_ROWS:
        return _launch(x, weight, options)
    else:
        rows = _launch(x, weight, options.without_noise()).rows
    return HeadStats(rows, None if noise is None else _launch_samples(x, weight, options, noise))


@torch.library.custom_op("shardlens::head_stats", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    target: Sequence[Tensor],
    noise: Sequence[Tensor],
    numbers: Sequence[int],
) -> list[Tensor]:
    """`head_stats` with `_flat` options; the tensors of its result."""
    return list(_forward(x, weight, _options(scale, target, noise, numbers)).tensors().values())


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    target: Sequence[Tensor],
    noise: Sequence[Tensor],
    numbers: Sequence[int],
) -> list[Tensor]:
    options = _options(scale, target, noise, numbers)
    return list(HeadStats.empty(x.shape[0], options, x.device).tensors().values())


def _flat(options: HeadOptions) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[int]]:
    """Options as an operator takes them: a target and noise as lists of tensors, empty for none."""
    target, noise = options.target, options.noise
    numbers = [options.k, options.first_id, options.rows_per_request]
    if noise is not None:
        numbers += [noise.n_best, noise.sample_row]
    return (
        options.scale,
        [] if target is None else [target.ids, target.logits, target.slack],
        [] if noise is None else [noise.seed, noise.step],
        numbers,
    )


def _options(
    scale: Tensor | None, target: Sequence[Tensor], noise: Sequence[Tensor], numbers: Sequence[int]
) -> HeadOptions:
    """The inverse of `_flat`."""
    k, first_id, rows_per_request, *noise_numbers = numbers
    return HeadOptions(
        k,
        first_id,
        scale,
        Target(*target) if target else None,
        rows_per_request,
        Noise(noise[0], noise[1], *noise_numbers) if noise else None,
    )


def head_stats(
    x: Tensor,
    weight: Tensor,
    *,
    k: int,
    first_id: int = 0,
    scale: Tensor | None = None,
    target: Target | None = None,
    rows_per_request: int = 1,
    noise: Noise | None = None,
) -> HeadStats:
    """Statistics of the logits x · weightᵀ of R rows over a slice of the vocabulary.

    x [R, d], weight [Vs, d] of one dtype (float32, bfloat16, float16), sums in float32; ids are
    counted from first_id. k: candidates kept per row; above MOST_K the reference runs. scale [R]
    float32 multiplies each row's logits first (an inverse temperature). target, noise: see
    `Target`, `Noise`. rows_per_request: how many rows follow each other in a request; KL is
    measured from the last of them; with 1 `cross` is 0. Not differentiable.
    Raises ValueError for k below 1, shapes that do not fit, or requests that are cut.
    """
    options = HeadOptions(k, first_id, scale, target, rows_per_request, noise)
    options.check(x, weight)
    if not torch.compiler.is_compiling():  # nothing here has a gradient
        return _forward(x, weight, options)
    return HeadStats.of_tensors(torch.ops.shardlens.head_stats(x, weight, *_flat(options)))

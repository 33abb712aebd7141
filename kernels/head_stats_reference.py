"""What the head's logits are needed for, without the logits.

    z = x · Wᵀ                       x [R, d] normed rows, W [Vs, d] this rank's vocabulary slice

Legend: R rows, Vs ids of the slice (global ids first_id ...), k winners, m row maximum.
Per row, over the slice, in one pass that holds one block of logits at a time:

    values, ids   the k largest z, ties by the lower id
    max           m = max z
    sum_exp       Σ exp(z - m)
    sum_dev       Σ exp(z - m) · (z - m)           for the entropy
    above         how many ids beat the target     (z larger, or equal with a lower id)
    cross         Σ exp(z_f - m_f) · (z_f - z)     for KL; f is the row's reference row
    target_logit  the target's z, 0 where the slice lacks it (to be summed over slices)
    key_ids, ...  the n best of z + Gumbel         for sampling

All are float32. Slices of one vocabulary combine exactly: see `parallel/winners.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .few_rows_linear import linear
from .gumbel import gumbel_reference

# Many rows share each reading (and conversion) of a block of W. Logits of 1 MiB stay in cache: of
# 2 MiB they take the same time and more memory, of 0.5 MiB more time. Few rows would have blocks
# of many ids, which only weights that are widened forbid.
ROW_BLOCK = 512
BLOCK_LOGITS = 2**18
FEW_ROWS, FEW_ROWS_LOGITS = 32, 2**19  # a decode step's, whose passes are short: fewer of them
WIDENED_BLOCK = 2048
SPAN, WORTH_SPANS = 128, 4  # columns, and how many times more there must be than are looked at
LOWEST = -1e30  # stands for logits of -inf in sums, where 0 * -inf would be NaN
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Target:
    """Per row: the id whose rank is asked, -1 for none, and its logit.

    The logit comes from `target_logits`. Where that rounds differently from the streamed logits,
    ids within `slack` of it count as tied with it, so that equal rows of W do tie; where it has
    their bits, the slack is 0.
    """

    ids: Tensor  # [R] int64
    logits: Tensor  # [R] float32
    slack: Tensor  # [R] float32

    def rows(self, rows: slice | Tensor) -> Target:
        return Target(self.ids[rows], self.logits[rows], self.slack[rows])


@dataclass(frozen=True)
class Noise:
    """One row of each of the first B groups is sampled from: keys are z + Gumbel(seed, step, id).

    It is the row at `place` of the group; where rows stand alone, that is the first B rows.
    """

    seed: Tensor  # [B] int64
    step: Tensor  # [B] int64
    n_best: int = 1
    place: int = 0

    def groups(self, groups: slice) -> Noise:
        return Noise(self.seed[groups], self.step[groups], self.n_best, self.place)

    def of_rows(self, rows: Tensor, group_size: int) -> Tensor:
        """The sampled ones of rows [R, ...], a view [B, ...]."""
        return rows[self.place :: group_size][: self.seed.shape[0]]


@dataclass
class HeadStats:
    """Statistics of R rows over one slice of the vocabulary; see the module's text."""

    values: Tensor  # [R, k]
    ids: Tensor  # [R, k] int64, -1 where the slice has fewer than k ids
    max: Tensor  # [R]
    sum_exp: Tensor  # [R]
    sum_dev: Tensor  # [R]
    above: Tensor  # [R] int64
    cross: Tensor  # [R]
    target_logit: Tensor  # [R]
    key_values: Tensor  # [B, n]
    key_ids: Tensor  # [B, n] int64
    key_logits: Tensor  # [B, n]


def head_stats_reference(
    x: Tensor,
    weight: Tensor,
    *,
    k: int,
    first_id: int = 0,
    scale: Tensor | None = None,
    target: Target | None = None,
    group_size: int = 1,
    noise: Noise | None = None,
    row_block: int = ROW_BLOCK,
    vocab_block: int | None = None,
) -> HeadStats:
    """Stream the slice; shapes and meaning in the module's text.

    scale [R] multiplies each row's logits before anything else (an inverse temperature).
    group_size: rows come in groups of this many, and the last of each is the reference row of
    its group. 1 means that there is none, and `cross` is 0.
    Block sizes change speed, memory and rounding; by default vocab_block follows from the rows.
    """
    n_rows, block = x.shape[0], max(1, row_block // group_size) * group_size
    check_groups(n_rows, group_size, noise)
    if vocab_block is None:
        vocab_block = _ids_of_block(min(block, n_rows or 1), weight)
    n_keyed, n_best = (0, 0) if noise is None else (noise.seed.shape[0], noise.n_best)
    out = empty_stats(n_rows, n_keyed, n_best, k, x.device)
    for start in range(0, n_rows, block):
        rows = slice(start, min(n_rows, start + block))
        groups = slice(rows.start // group_size, rows.stop // group_size)
        own_target, own_noise = target and target.rows(rows), noise and noise.groups(groups)
        part = _RowBlock(_part_of(out, rows, groups), first_id, group_size, own_target, own_noise)
        own_x = x[rows] if x.is_cuda else x[rows].float()  # once, not once a block of ids
        for low in range(0, weight.shape[0], vocab_block):
            z = float_logits(own_x, weight[low : low + vocab_block])
            part.add(z if scale is None else z.mul_(scale[rows, None]), low)
    return out


def _ids_of_block(n_rows: int, weight: Tensor) -> int:
    logits = BLOCK_LOGITS if n_rows > FEW_ROWS else FEW_ROWS_LOGITS
    ids = max(1, logits // n_rows)
    return ids if weight.dtype == torch.float32 else min(WIDENED_BLOCK, ids)


def check_groups(n_rows: int, group_size: int, noise: Noise | None) -> None:
    if n_rows % group_size:
        raise ValueError(f"{n_rows} rows are not whole groups of {group_size}")
    if noise is None:
        return
    if not 0 <= noise.place < group_size:
        raise ValueError(
            f"place {noise.place} of the sampled row is outside groups of {group_size}"
        )
    if noise.seed.shape[0] > n_rows // group_size:
        raise ValueError(f"{noise.seed.shape[0]} seeds for {n_rows // group_size} groups of rows")


def float_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, d] · weight [C, d]ᵀ with float32 sums and a float32 result [R, C].

    Half-precision products rounded to half precision would tie and re-order the winners. On CPU
    no torch operator multiplies bf16 into float32, and oneDNN's rounding of float32 operands is
    a flag of the whole process. So W is widened block by block: 1 / R of the product's work.
    """
    if x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return linear(x.float(), weight.float())


def empty_stats(n_rows: int, n_keyed: int, n_best: int, k: int, device: torch.device) -> HeadStats:
    """Those of a slice without ids."""

    def full(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    lowest = -torch.inf
    return HeadStats(
        values=full((n_rows, k), lowest),
        ids=full((n_rows, k), -1, torch.int64),
        max=full((n_rows,), lowest),
        sum_exp=full((n_rows,), 0),
        sum_dev=full((n_rows,), 0),
        above=full((n_rows,), 0, torch.int64),
        cross=full((n_rows,), 0),
        target_logit=full((n_rows,), 0),
        key_values=full((n_keyed, n_best), lowest),
        key_ids=full((n_keyed, n_best), -1, torch.int64),
        key_logits=full((n_keyed, n_best), lowest),
    )


def _part_of(stats: HeadStats, rows: slice, groups: slice) -> HeadStats:
    """Views of some rows, which are whole groups."""
    return HeadStats(
        **{
            name: value[groups if name.startswith("key_") else rows]
            for name, value in vars(stats).items()
        }
    )


@dataclass
class _RowBlock:
    """Running statistics of one block of rows, updated in place block of ids by block of ids."""

    stats: HeadStats
    first_id: int
    group_size: int
    target: Target | None
    noise: Noise | None

    def add(self, z: Tensor, low: int) -> None:
        """Take in logits z [r, C] of local ids low, low + 1, ...; z is overwritten."""
        first_id, block_max = self.first_id + low, z.amax(-1)
        self._winners(z, block_max, first_id)
        if self.target is not None:
            self.stats.above += _count_above(z, first_id, self.target)
            self.stats.target_logit += _at_target(z, first_id, self.target)
        if self.noise is not None and self.noise.seed.numel():
            self._sample(self.noise.of_rows(z, self.group_size), self.noise, first_id)
        self._sums(z, block_max)

    def _winners(self, z: Tensor, block_max: Tensor, first_id: int) -> None:
        """Update the top-k of the rows that this block changes: soon few, as the winners rise.

        A block that only ties with the last winner does not: its ids are higher.
        """
        values, ids = self.stats.values, self.stats.ids
        rows = (~(block_max[:, None] <= values[:, -1:]).all(-1)).nonzero()[:, 0]
        if rows.numel():
            changed = z if rows.numel() == z.shape[0] else z[rows]
            new_values, columns = _block_best(changed, min(values.shape[1], z.shape[1]))
            best = values[rows], ids[rows]
            _keep_best(best, (new_values, columns + first_id))
            values[rows], ids[rows] = best

    def _sums(self, z: Tensor, block_max: Tensor) -> None:
        """Rescale what was summed to the new maximum, then add the block's share."""
        stats = self.stats
        new_max = torch.maximum(stats.max, block_max)
        base = new_max.masked_fill(new_max.isneginf(), 0)  # as long as all are -inf
        shift = stats.max - base
        old_exp, scale = stats.sum_exp, shift.exp()
        # an empty state has max -inf: 0 * -inf would be NaN
        moved = torch.where(old_exp > 0, stats.sum_dev + shift * old_exp, 0) * scale
        z.clamp_(min=LOWEST)
        if self.group_size > 1:
            self._cross(z, base, scale)
        dev = z.sub_(base[:, None])
        exp = dev.exp()
        stats.sum_exp.copy_(old_exp * scale + exp.sum(-1))
        stats.sum_dev.copy_(moved + exp.mul_(dev).sum(-1))
        stats.max.copy_(new_max)

    def _cross(self, z: Tensor, base: Tensor, scale: Tensor) -> None:
        grouped = z.unflatten(0, (-1, self.group_size))  # [n, g, C]
        reference = grouped[:, -1]
        top = base.view(-1, self.group_size)[:, -1]
        weight = (reference - top[:, None]).exp()  # [n, C]
        gap = reference[:, None] - grouped  # [n, g, C]
        cross = self.stats.cross.view(-1, self.group_size)
        cross.mul_(scale.view(-1, self.group_size)[:, -1:])
        cross.add_(torch.bmm(gap, weight[..., None])[..., 0])

    def _sample(self, z: Tensor, noise: Noise, first_id: int) -> None:
        stats = self.stats
        ids = torch.arange(first_id, first_id + z.shape[1], device=z.device)
        keys = z + gumbel_reference(noise.seed[:, None], noise.step[:, None], ids[None])
        values, columns = _block_best(keys, min(noise.n_best, z.shape[1]))
        _keep_best(
            (stats.key_values, stats.key_ids, stats.key_logits),
            (values, columns + first_id, z.gather(1, columns)),
        )


def _count_above(z: Tensor, first_id: int, target: Target) -> Tensor:
    ids = torch.arange(first_id, first_id + z.shape[1], device=z.device)
    low, high = target.logits - target.slack, target.logits + target.slack
    target_ids = target.ids[:, None]
    beats = (z > high[:, None]) | ((z >= low[:, None]) & (ids < target_ids))
    return (beats & (ids != target_ids)).sum(-1, dtype=torch.int32)  # a sum of bool is int64


def _at_target(z: Tensor, first_id: int, target: Target) -> Tensor:
    local = target.ids - first_id
    is_here = (local >= 0) & (local < z.shape[1])
    return z.gather(1, local.where(is_here, 0)[:, None])[:, 0].where(is_here, 0)


def _keep_best(best: tuple[Tensor, ...], block: tuple[Tensor, ...]) -> None:
    """Merge a block's winners [r, k'] into the running ones [r, k], in place.

    The first tensor of each tuple orders the rest. A block's winners stand in the order of their
    ids, and blocks come in it too, so a stable sort leaves the lower id first where values tie.
    """
    k = best[0].shape[1]
    order = torch.cat((best[0], block[0]), -1).argsort(dim=-1, descending=True, stable=True)
    for running, new in zip(best, block, strict=True):
        running.copy_(torch.cat((running, new), -1).gather(1, order[:, :k]))


def _block_best(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row [r, C], ties to the lower column: (values, columns), by column."""
    if z.shape[1] >= WORTH_SPANS * k * SPAN:
        columns = _columns_of_best_spans(z, k)  # [r, k * SPAN and the rest]
        values, at = _block_best(z.gather(1, columns), k)
        return values, columns.gather(1, at)
    values, columns = z.topk(min(k + 1, z.shape[1]), dim=-1)
    if columns.shape[1] > k:
        # topk breaks ties at will; it matters only where the last winner ties with the next
        tied = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
        columns = columns[:, :k]
        if tied.numel():
            columns[tied] = z[tied].argsort(dim=-1, descending=True, stable=True)[:, :k]
    columns = columns.sort(-1).values
    return z.gather(1, columns), columns


def _columns_of_best_spans(z: Tensor, k: int) -> Tensor:
    """Where the k best of each row must be: in the k spans of columns with the largest maxima.

    An id elsewhere has k ids before it, one in each of these spans; of equal maxima the lower
    spans are taken, so that this holds for ties too. Looking at maxima is faster than at all.
    """
    n_spans = z.shape[1] // SPAN
    maxima = z[:, : n_spans * SPAN].unflatten(1, (n_spans, SPAN)).amax(-1)
    best = maxima.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values
    columns = best[..., None] * SPAN + torch.arange(SPAN, device=z.device)
    rest = torch.arange(n_spans * SPAN, z.shape[1], device=z.device)
    return torch.cat((columns.flatten(1), rest.expand(z.shape[0], -1)), 1)


def mass_above_reference(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor,
    than_logits: Tensor,
    than_ids: Tensor,
    top: Tensor,
    first_id: int = 0,
    vocab_block: int = WIDENED_BLOCK,
) -> Tensor:
    """Σ exp(z - top) over the slice's ids that beat each of n candidates: [B, n] float32.

    z = scale · (x · Wᵀ); candidates than_logits, than_ids [B, n]; top [B].
    """
    mass = torch.zeros_like(than_logits)
    logits, target_ids = than_logits[..., None], than_ids[..., None]  # [B, n, 1]
    for low in range(0, weight.shape[0], vocab_block):
        z = float_logits(x, weight[low : low + vocab_block]).mul_(scale[:, None])[:, None]
        ids = torch.arange(first_id + low, first_id + low + z.shape[-1], device=z.device)
        beats = (z > logits) | ((z == logits) & (ids < target_ids))  # [B, n, C]
        # its own logit here may differ by rounding from the candidate's, if a kernel made that
        beats &= ids != target_ids
        mass += ((z - top[:, None, None]).exp() * beats).sum(-1)
    return mass

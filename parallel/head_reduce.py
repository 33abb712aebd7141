"""Exact global answers about the head's logits from one small exchange.

Each rank reduces its vocabulary slice to k candidates and a few sums per row (`head_stats`), packs
them into one buffer, and one all-gather later every rank has the same, exact, global top-k,
log-sum-exp, entropy, rank and KL. Per row and receiving rank that is 8k + 24 bytes; a target adds
an all-reduce of two float32. Combining p slices with maxima m_r, with m = max m_r:

    Σ exp(z - m)             = Σ_r s_r · exp(m_r - m)                     s_r: sum_exp
    Σ exp(z - m)(z - m)      = Σ_r exp(m_r - m) · (t_r + (m_r - m) s_r)   t_r: sum_dev
    log-sum-exp              = m + log Σ exp(z - m)
    entropy                  = log Σ exp(z - m) - Σ exp(z - m)(z - m) / Σ exp(z - m)
    KL(final ‖ layer)        = Σ p_f (z_f - z) - lse_f + lse

The sums are combined in float64: there are only p of them per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.head_stats import head_stats
from ..kernels.head_stats_reference import mass_above_reference
from ..kernels.head_types import HeadStats, Noise, RowStats, SampleStats, Target
from ..kernels.target_logits import target_logits
from .collectives import gather_over, reduce_over
from .group import Axes
from .packing import Field, RowLayout
from .vocab import Head, local_rows


@dataclass(frozen=True)
class SampleResult:
    """The n best Gumbel keys of each of B sampled rows, the same on every rank."""

    token_ids: Tensor  # [B, n] int64, best key first
    logits: Tensor  # [B, n] float32


@dataclass(frozen=True)
class HeadResult:
    """Global statistics of R rows, the same on every rank. Floats are float32."""

    token_ids: Tensor  # [R, k] int64, best first, ties by the lower id
    logits: Tensor  # [R, k]
    logprobs: Tensor  # [R, k] against the global log-sum-exp
    logsumexp: Tensor  # [R]
    entropy: Tensor  # [R] nats
    target_logprob: Tensor  # [R], NaN where there is no target
    target_rank: Tensor  # [R] int64: how many ids beat the target, -1 where there is none
    kl_to_final: Tensor  # [R] nats, from the last row of the row's request to this row
    samples: SampleResult | None = None  # where noise was given

    def rows(self, rows: slice | Tensor) -> HeadResult:
        """The statistics of some rows, without samples; views for a slice."""
        values = {name: value[rows] for name, value in vars(self).items() if name != "samples"}
        return HeadResult(**values)


@torch.no_grad()
def reduce_head(
    x: Tensor,
    head: Head,
    *,
    k: int,
    scale: Tensor | None = None,
    target_ids: Tensor | None = None,
    rows_per_request: int = 1,
    noise: Noise | None = None,
) -> HeadResult:
    """Statistics of the head's logits for normed rows x [R, d], the same on every rank.

    target_ids [R] int64; an id outside the vocabulary, such as -1, is none. rows_per_request: KL is
    taken from the last row of each request of this many rows. scale, noise: see `head_stats`.
    Nothing waits for results on the host. Raises ValueError where k exceeds the vocabulary.
    """
    if not 1 <= k <= head.vocab.full:
        raise ValueError(f"top-k of {k} is outside 1 to {head.vocab.full}, the vocabulary's size")
    target = None if target_ids is None else _target(x, head, target_ids, scale, k)
    stats = head_stats(
        x,
        head.valid_weight,
        k=k,
        first_id=head.vocab.start,
        scale=scale,
        target=target,
        rows_per_request=rows_per_request,
        noise=noise,
    )
    slices = _gather(stats, head.axes)
    samples = None if slices.samples is None else _merge_samples(slices.samples)
    return _merge_rows(slices.rows, target, rows_per_request, samples)


@torch.no_grad()
def mass_above(
    x: Tensor, head: Head, *, scale: Tensor, candidates: SampleResult, logsumexp: Tensor
) -> Tensor:
    """Probability [B, n] of all ids that beat each candidate, under softmax(scale · z).

    x [B, d] normed rows; scale [B]; logsumexp [B] of scale · z.
    """
    mass = mass_above_reference(
        x,
        head.valid_weight,
        scale=scale,
        logits=candidates.logits,
        token_ids=candidates.token_ids,
        logsumexp=logsumexp,
        first_id=head.vocab.start,
    )
    return reduce_over(mass, head.axes)


@torch.no_grad()
def token_logits(x: Tensor, head: Head, token_ids: Tensor) -> Tensor:
    """Logits [R, n] float32 of n ids alone, the same on every rank: n products per row, not V.

    x [R, d] normed rows; token_ids [n] int64 inside the vocabulary.
    """
    return reduce_over(
        x.float() @ local_rows(head.weight, head.vocab, token_ids).float().T, head.axes
    )


@torch.no_grad()
def head_rows(head: Head, token_ids: Tensor) -> Tensor:
    """Rows [n, d] of the unembedding for n ids inside the vocabulary, the same on every rank.

    In the weight's dtype, and exact: each row is one rank's, and zero on the others.
    """
    return reduce_over(local_rows(head.weight, head.vocab, token_ids), head.axes)


def _target(x: Tensor, head: Head, target_ids: Tensor, scale: Tensor | None, k: int) -> Target:
    # an id outside the vocabulary is no target: to refuse it, the host would have to wait
    target_ids = target_ids.where(target_ids < head.vocab.full, -1)
    local = target_logits(x, head.valid_weight, target_ids, first_id=head.vocab.start, k=k)
    logits, slack = reduce_over(local, head.axes).unbind(-1)
    if scale is not None:
        logits, slack = logits * scale, slack * scale
    return Target(target_ids, logits.masked_fill(target_ids < 0, torch.inf), slack)


def _row_layout(k: int) -> RowLayout:
    """The fields of `RowStats`."""
    return RowLayout(
        (
            Field("token_ids", torch.int64, k),
            Field("target_rank", torch.int64),
            Field("logits", torch.float32, k),
            Field("max", torch.float32),
            Field("sum_exp", torch.float32),
            Field("sum_dev", torch.float32),
            Field("cross", torch.float32),
            Field("target_logit", torch.float32),
        )
    )


def _sample_layout(n: int) -> RowLayout:
    """The fields of `SampleStats`."""
    return RowLayout(
        (
            Field("token_ids", torch.int64, n),
            Field("logits", torch.float32, n),
            Field("keys", torch.float32, n),
        )
    )


def _gather(stats: HeadStats, axes: Axes) -> HeadStats:
    """The statistics of every rank's slice, [p, R, ...] and [p, B, ...], in one exchange."""
    layout = _row_layout(stats.rows.logits.shape[1])
    packed = layout.pack(vars(stats.rows))
    if stats.samples is None:
        return HeadStats(RowStats(**layout.unpack(gather_over(packed, axes))))
    sample_layout = _sample_layout(stats.samples.keys.shape[1])
    packed_samples = sample_layout.pack(vars(stats.samples))
    flat = gather_over(torch.cat((packed.flatten(), packed_samples.flatten())), axes)
    rows, samples = flat.split((packed.numel(), packed_samples.numel()), -1)
    return HeadStats(
        RowStats(**layout.unpack(rows.unflatten(1, packed.shape))),
        SampleStats(**sample_layout.unpack(samples.unflatten(1, packed_samples.shape))),
    )


def _merge_samples(slices: SampleStats) -> SampleResult:
    """slices [p, B, n] -> [B, n]."""
    _, token_ids, logits = _best(slices.keys, slices.token_ids, slices.logits)
    return SampleResult(token_ids, logits)


def _merge_rows(
    slices: RowStats, target: Target | None, rows_per_request: int, samples: SampleResult | None
) -> HeadResult:
    """slices [p, R, ...] -> [R, ...]."""
    logits, token_ids = _best(slices.logits, slices.token_ids)
    maxima, sum_exp, sum_dev = (x.double() for x in (slices.max, slices.sum_exp, slices.sum_dev))
    top = maxima.amax(0)
    shift = maxima - top
    scale = shift.exp()
    total = (sum_exp * scale).sum(0)
    # a rank without ids has m_r = -inf and s_r = 0, whose product would be NaN
    moved = torch.where(sum_exp > 0, sum_dev + shift * sum_exp, 0)
    mean_dev = (moved * scale).sum(0) / total
    logsumexp = top + total.log()
    return HeadResult(
        token_ids=token_ids,
        logits=logits,
        logprobs=(logits.double() - logsumexp[:, None]).float(),
        logsumexp=logsumexp.float(),
        entropy=(total.log() - mean_dev).float(),
        target_logprob=_target_logprob(slices, target, logsumexp),
        target_rank=_target_rank(slices, target, token_ids),
        kl_to_final=_kl(slices.cross, scale, total, logsumexp, rows_per_request),
        samples=samples,
    )


def _best(values: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The n best of all slices [p, R, n], and the others' entries there: [R, n] each.

    Slices come in the order of ids, so a stable sort leaves ties in that order.
    """
    n = values.shape[-1]
    first, *rest = (x.movedim(0, 1).flatten(1) for x in (values, *others))  # [R, p * n]
    best, order = first.sort(dim=-1, descending=True, stable=True)
    return best[:, :n], *(other.gather(1, order[:, :n]) for other in rest)


def _target_logprob(slices: RowStats, target: Target | None, logsumexp: Tensor) -> Tensor:
    """From the streamed logit, so that a target in the top-k has the log-prob given there."""
    if target is None:
        return torch.full_like(logsumexp, torch.nan).float()
    logprob = (slices.target_logit.double().sum(0) - logsumexp).float()
    return logprob.masked_fill(target.ids < 0, torch.nan)


def _target_rank(slices: RowStats, target: Target | None, token_ids: Tensor) -> Tensor:
    """How many ids beat the target, or its position in the top-k where it is one of them.

    The target's logit is a separate product and may differ from the streamed one by rounding;
    reading the position off the top-k keeps rank and top-k in agreement.
    """
    if target is None:
        return token_ids.new_full(token_ids.shape[:1], -1)
    rank = slices.target_rank.sum(0).clamp(min=token_ids.shape[1])
    is_target = token_ids == target.ids[:, None]
    rank = torch.where(is_target.any(-1), is_target.int().argmax(-1), rank)
    return rank.masked_fill(target.ids < 0, -1)


def _kl(
    cross: Tensor, scale: Tensor, total: Tensor, logsumexp: Tensor, rows_per_request: int
) -> Tensor:
    """cross, scale [p, R]; total, logsumexp [R] -> [R]."""
    if rows_per_request == 1:
        return torch.zeros_like(logsumexp).float()

    def last_of_request(rows: Tensor) -> Tensor:
        requests = rows.unflatten(-1, (-1, rows_per_request))
        return requests[..., -1:].expand_as(requests).flatten(-2)

    expected_gap = (cross.double() * last_of_request(scale)).sum(0) / last_of_request(total)
    return (expected_gap - last_of_request(logsumexp) + logsumexp).float()

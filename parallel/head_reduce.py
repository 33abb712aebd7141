"""Exact global answers about the head's logits from one small exchange.

Each rank reduces its vocabulary slice to k winners and a few sums per row (`head_stats`), packs
them into one float32 buffer, and one all-gather later every rank has the same, exact, global
top-k, log-sum-exp, entropy, rank and KL. Per row and receiving rank that is 8k + 24 bytes; a
target adds an all-reduce of two float32. Combining p slices with maxima m_r, with m = max m_r:

    Σ exp(z - m)             = Σ_r s_r · exp(m_r - m)                     s_r: sum_exp
    Σ exp(z - m)(z - m)      = Σ_r exp(m_r - m) · (t_r + (m_r - m) s_r)   t_r: sum_dev
    log-sum-exp              = m + log Σ exp(z - m)
    entropy                  = log Σ exp(z - m) - Σ exp(z - m)(z - m) / Σ exp(z - m)
    KL(final ‖ layer)        = Σ p_f (z_f - z) - lse_f + lse

The sums are combined in float64: there are only p of them a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.head_stats import head_stats
from ..kernels.head_stats_reference import HeadStats, Noise, Target, mass_above_reference
from ..kernels.target_logits import target_logits
from .collectives import all_gather, all_reduce
from .vocab import VocabHead


@dataclass(frozen=True)
class Winners:
    """Global statistics of R rows, the same on every rank. Floats are float32."""

    token_ids: Tensor  # [R, k] int64, best first, ties by the lower id
    logits: Tensor  # [R, k]
    logprobs: Tensor  # [R, k] against the global log-sum-exp
    logsumexp: Tensor  # [R]
    entropy: Tensor  # [R] nats
    target_logprob: Tensor  # [R], NaN where there is no target
    target_rank: Tensor  # [R] int64: how many ids beat the target, -1 where there is none
    kl_to_reference: Tensor  # [R] nats, from the group's last row to this row
    key_ids: Tensor  # [B, n] int64: ids of sampled rows in the order of their Gumbel keys
    key_logits: Tensor  # [B, n]


@torch.no_grad()
def reduce_head(
    x: Tensor,
    head: VocabHead,
    *,
    k: int,
    scale: Tensor | None = None,
    target_ids: Tensor | None = None,
    group_size: int = 1,
    noise: Noise | None = None,
) -> Winners:
    """What the head says of normed rows x [R, d], the same on every rank.

    target_ids [R] int64; one outside the vocabulary, such as -1, is none. group_size: KL is taken
    from the last row of every group of this many rows. scale, noise: see `head_stats`. Nothing
    waits for results on the host. Raises ValueError where k exceeds the vocabulary.
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
        group_size=group_size,
        noise=noise,
    )
    gathered = all_gather(_pack(stats), head.parallel)
    return _merge([_unpack(flat, stats) for flat in gathered], target, k, group_size)


@torch.no_grad()
def mass_above(x: Tensor, head: VocabHead, *, scale: Tensor, than: Winners) -> Tensor:
    """Probability [B, n] of all ids that beat each key id of `than`, under softmax(scale · z)."""
    mass = mass_above_reference(
        x,
        head.valid_weight,
        scale=scale,
        than_logits=than.key_logits,
        than_ids=than.key_ids,
        top=than.logsumexp,
        first_id=head.vocab.start,
    )
    return all_reduce(mass, head.parallel)


@torch.no_grad()
def token_logits(x: Tensor, head: VocabHead, token_ids: Tensor) -> Tensor:
    """Logits [R, n] float32 of n ids alone, the same on every rank: n products a row, not V.

    x [R, d] normed rows; token_ids [n] int64 inside the vocabulary.
    """
    local = token_ids - head.vocab.start
    is_mine = (local >= 0) & (local < head.vocab.size)
    # of another rank's ids any row will do; a rank without ids still has padding
    weight = head.weight[local.where(is_mine, 0)].float()
    return all_reduce((x.float() @ weight.T).where(is_mine, 0), head.parallel)


def _target(x: Tensor, head: VocabHead, target_ids: Tensor, scale: Tensor | None, k: int) -> Target:
    # one outside the vocabulary counts as none: to refuse it, the host would have to wait
    target_ids = target_ids.where(target_ids < head.vocab.full, -1)
    own = target_logits(x, head.valid_weight, target_ids, first_id=head.vocab.start, k=k)
    logits, slack = all_reduce(own, head.parallel).unbind(-1)
    if scale is not None:
        logits, slack = logits * scale, slack * scale
    return Target(target_ids, logits.masked_fill(target_ids < 0, torch.inf), slack)


def _pack(stats: HeadStats) -> Tensor:
    """One flat float32 buffer; ids and counts travel as the bits of int32."""
    fields = vars(stats).values()
    return torch.cat([(_as_bits(x) if x.dtype == torch.int64 else x).flatten() for x in fields])


def _as_bits(ids: Tensor) -> Tensor:
    return ids.to(torch.int32).view(torch.float32)


def _unpack(flat: Tensor, like: HeadStats) -> HeadStats:
    """The inverse of `_pack`, with the shapes of `like`."""
    fields = {}
    start = 0
    for name, own in vars(like).items():
        part = flat[start : start + own.numel()]
        start += own.numel()
        if own.dtype == torch.int64:
            part = part.view(torch.int32).long()
        fields[name] = part.view(own.shape)
    return HeadStats(**fields)


def _merge(slices: list[HeadStats], target: Target | None, k: int, group_size: int) -> Winners:
    values, ids = _best([part.values for part in slices], k, [part.ids for part in slices])
    n_best = slices[0].key_ids.shape[1]
    _, key_ids, key_logits = _best(
        [part.key_values for part in slices],
        n_best,
        [part.key_ids for part in slices],
        [part.key_logits for part in slices],
    )
    maxima = torch.stack([part.max for part in slices]).double()  # [p, R]
    top = maxima.amax(0)
    sum_exp = torch.stack([part.sum_exp for part in slices]).double()
    sum_dev = torch.stack([part.sum_dev for part in slices]).double()
    shift = maxima - top
    scale = shift.exp()
    total = (sum_exp * scale).sum(0)
    # a rank without ids has m_r = -inf and s_r = 0, whose product would be NaN
    moved = torch.where(sum_exp > 0, sum_dev + shift * sum_exp, 0)
    mean_dev = (moved * scale).sum(0) / total
    logsumexp = top + total.log()
    return Winners(
        token_ids=ids,
        logits=values,
        logprobs=(values.double() - logsumexp[:, None]).float(),
        logsumexp=logsumexp.float(),
        entropy=(total.log() - mean_dev).float(),
        target_logprob=_target_logprob(slices, target, logsumexp),
        target_rank=_target_rank(slices, target, ids),
        kl_to_reference=_kl(slices, scale, total, logsumexp, group_size),
        key_ids=key_ids,
        key_logits=key_logits,
    )


def _best(values: list[Tensor], k: int, *others: list[Tensor]) -> tuple[Tensor, ...]:
    """The k best of all slices, which stand in the order of ids: the stable sort does the rest."""
    best, order = torch.sort(torch.cat(values, -1), dim=-1, descending=True, stable=True)
    order = order[:, :k]
    return best[:, :k], *(torch.cat(other, -1).gather(1, order) for other in others)


def _target_logprob(slices: list[HeadStats], target: Target | None, logsumexp: Tensor) -> Tensor:
    """From the streamed logit, so that a target among the winners has the winner's log-prob."""
    if target is None:
        return torch.full_like(logsumexp, torch.nan).float()
    logit = torch.stack([part.target_logit for part in slices]).double().sum(0)
    logprob = (logit - logsumexp).float()
    return logprob.masked_fill(target.ids < 0, torch.nan)


def _target_rank(slices: list[HeadStats], target: Target | None, ids: Tensor) -> Tensor:
    """The count of ids above, or the place among the winners where the target is one of them.

    The target's logit is a product of its own and may differ from the winners' by rounding;
    reading its place off the winners keeps rank and top-k in agreement.
    """
    if target is None:
        return ids.new_full(ids.shape[:1], -1)
    above = torch.stack([part.above for part in slices]).sum(0)
    is_target = ids == target.ids[:, None]
    rank = torch.where(is_target.any(-1), is_target.int().argmax(-1), above.clamp(min=ids.shape[1]))
    return rank.masked_fill(target.ids < 0, -1)


def _kl(
    slices: list[HeadStats], scale: Tensor, total: Tensor, logsumexp: Tensor, group_size: int
) -> Tensor:
    if group_size == 1:
        return torch.zeros_like(logsumexp).float()

    def last_of_group(rows: Tensor) -> Tensor:
        groups = rows.unflatten(-1, (-1, group_size))
        return groups[..., -1:].expand_as(groups).flatten(-2)

    cross = torch.stack([part.cross for part in slices]).double()
    expected_gap = (cross * last_of_group(scale)).sum(0) / last_of_group(total)
    return (expected_gap - last_of_group(logsumexp) + logsumexp).float()

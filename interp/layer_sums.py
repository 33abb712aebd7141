"""Metrics of layers as sums, so that ranks with other texts add theirs in one all-reduce."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..parallel.head_reduce import HeadResult

# Of each layer: a count and the sums that it divides, then those of other counts.
_READ = ("rows", "entropy", "kl_to_final", "leads", "agrees_with_next", "first_leads")
_TARGETS = ("targets", "loss")
_NORMS = ("positions", "norm")
_TEXTS = ("texts", "sink")
FIELDS = (*_READ, *_TARGETS, *_NORMS, *_TEXTS)


@dataclass(frozen=True)
class LayerMetrics:
    """Findings of a monitor at a step, by layer; NaN where there was nothing to measure by.

    layers: numbers of blocks, whose outputs were read. loss: nats per token, if the layer were the
    last. entropy, kl_to_final: nats. leads: share of positions at which the final layer's best
    token is the layer's, too; first_leads: for the first time. agrees_with_next: share at which the
    next layer's best token is the same. norm: mean L2 norm of the states. sink: largest norm of a
    text over its median one, on average. depth: the mean layer at which the final best token first
    leads.
    """

    step: int
    layers: list[int]
    loss: list[float]
    entropy: list[float]
    kl_to_final: list[float]
    leads: list[float]
    first_leads: list[float]
    agrees_with_next: list[float]
    norm: list[float]
    sink: list[float]
    depth: float

    @classmethod
    def of(cls, step: int, layers: list[int], sums: Tensor) -> LayerMetrics:
        """The means of sums [layers, fields]."""
        columns = dict(zip(FIELDS, sums.double().cpu().unbind(1), strict=True))
        means = {
            name: (columns[name] / columns[count]).tolist()
            for count, *names in (_READ, _TARGETS, _NORMS, _TEXTS)
            for name in names
        }
        first = columns["first_leads"]
        depth = (first * torch.tensor(layers, dtype=torch.float64)).sum() / first.sum()
        return cls(step=step, layers=layers, depth=float(depth), **means)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: NaN is None."""
        return {
            name: [_or_none(each) for each in value] if isinstance(value, list) else _or_none(value)
            for name, value in asdict(self).items()
        }


def layer_sums(read: HeadResult | None, norms: Tensor, *, has_final: bool) -> Tensor:
    """[layers, fields] float64 of the rows [N, layers] of a lens and of norms [layers, B, T].

    has_final: whether the last layer is the model's. Without it, and without a lens, the sums that
    need them are NaN.
    """
    sums = norms.new_full((len(norms), len(FIELDS)), torch.nan, dtype=torch.float64)
    column = {name: sums[:, index] for index, name in enumerate(FIELDS)}
    column["positions"][:] = norms[0].numel()
    column["norm"][:] = norms.double().sum((1, 2))
    column["texts"][:] = norms.shape[1]
    column["sink"][:] = (norms.amax(2) / norms.median(2).values).double().sum(1)
    if read is None:
        return sums
    best = read.token_ids[..., 0]  # [N, layers]
    has_target = read.target_rank >= 0
    column["rows"][:] = best.shape[0]
    column["entropy"][:] = read.entropy.double().sum(0)
    column["agrees_with_next"][:-1] = (best[:, :-1] == best[:, 1:]).double().sum(0)
    column["targets"][:] = has_target.double().sum(0)
    column["loss"][:] = -read.target_logprob.double().where(has_target, 0).sum(0)
    if has_final:
        leads = best == best[:, -1:]
        first = leads & (leads.cumsum(1) == 1)
        column["kl_to_final"][:] = read.kl_to_final.double().sum(0)
        column["leads"][:] = leads.double().sum(0)
        column["first_leads"][:] = first.double().sum(0)
    return sums


def _or_none(value: float) -> float | None:
    return None if value != value else value

"""The k best of each row of a block of logits, exactly: ties go to the lower id."""

from __future__ import annotations

import torch
from torch import Tensor

SPAN, WORTH_SPANS = 128, 4  # columns, and how many times more there must be than are looked at


def keep_best(best: tuple[Tensor, ...], block: tuple[Tensor, ...]) -> None:
    """Merge a block's candidates [r, k'] into the running ones [r, k], in place.

    The first tensor of each tuple orders the rest. A block's candidates are ordered by their ids,
    and so are the blocks, so a stable sort leaves the lower id first where values tie.
    """
    k = best[0].shape[1]
    order = torch.cat((best[0], block[0]), -1).argsort(dim=-1, descending=True, stable=True)
    for running, new in zip(best, block, strict=True):
        running.copy_(torch.cat((running, new), -1).gather(1, order[:, :k]))


def block_best(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row [r, C], ties to the lower column: (values, columns), by column."""
    if z.shape[1] >= WORTH_SPANS * k * SPAN:
        columns = _columns_of_best_spans(z, k)  # [r, k * SPAN and the rest]
        values, picked = block_best(z.gather(1, columns), k)
        return values, columns.gather(1, picked)
    values, columns = z.topk(min(k + 1, z.shape[1]), dim=-1)
    if columns.shape[1] > k:
        # topk breaks ties arbitrarily, which matters only where the k-th ties with the next
        tied = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
        columns = columns[:, :k]
        if tied.numel():
            columns[tied] = z[tied].argsort(dim=-1, descending=True, stable=True)[:, :k]
    columns = columns.sort(-1).values
    return z.gather(1, columns), columns


def _columns_of_best_spans(z: Tensor, k: int) -> Tensor:
    """Columns that hold the k best of each row: the k spans with the largest maxima, and the rest.

    Any other id is beaten by k ids, one in each of these spans; of equal maxima the lower spans
    are taken, so that this holds for ties too. Comparing maxima is faster than sorting all columns.
    """
    n_spans = z.shape[1] // SPAN
    maxima = z[:, : n_spans * SPAN].unflatten(1, (n_spans, SPAN)).amax(-1)
    best = maxima.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values
    columns = best[..., None] * SPAN + torch.arange(SPAN, device=z.device)
    rest = torch.arange(n_spans * SPAN, z.shape[1], device=z.device)
    return torch.cat((columns.flatten(1), rest.expand(z.shape[0], -1)), 1)

"""Cross-entropy of a head whose vocabulary is split over ranks; logits are never held whole.

    z = h · Wᵀ,  m_i = max_v z_iv,  s_i = Σ_v exp(z_iv - m_i)          h [R, d], W [V, d]
    loss_i = m_i + log s_i - z_it                                      t: target
    dz_iv  = g_i · (exp(z_iv - m_i) / s_i - [v = t])                   g: gradient to the losses
    dh = Σ_r dz_r · W_r,  dW_r = dz_rᵀ · h                             r: ranks, each with its ids

Forward, each rank forms its logits a chunk at a time and keeps three numbers per row: maximum, sum
and the target's logit. These are what Shoeybi et al. (arXiv 1909.08053) reduce over ranks; here
they travel together, in one all-gather of 12 bytes per row. Backward, the chunks are formed again
(Wijmans et al., arXiv 2411.09009), a fourth product of the head's size beside the three of the
plain loss. dh is summed over ranks once; W and its gradient stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.launch import wide
from .collectives import gather_over, reduce_over
from .vocab import Head

REDUCTIONS = ("mean", "sum", "none")
CHUNK_NUMBERS = 2**21  # 8 MiB of float32 logits at once


def vocab_parallel_cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int = 1024,
) -> Tensor:
    """F.cross_entropy of the full logits of `hidden`, the same on every rank, in nats.

    hidden [..., d]: normed states (the final norm applied), the same on each rank; targets [...]
    int64. Rows whose target is `ignore_index` have loss 0 and are not counted by "mean", which is
    NaN where no row counts. Returns a scalar, or [...] for "none", in float32 (float64 for float64
    states): logits are float32 whatever the dtypes of states and weight, also under autocast.
    Differentiable once, to hidden (summed over ranks) and to the head's weight (this rank's rows).
    chunk_rows: the most rows that are decoded at once, by as many ids as 8 MiB of logits allow.

    Raises ValueError for shapes that do not fit, an unknown reduction, and for CPU tensors where a
    target is neither in the vocabulary nor `ignore_index`. On a GPU and under torch.compile, which
    takes it as part of its graph, targets are not checked: the loss of such a row is NaN, and so
    are the gradients.
    """
    _check(hidden, head, targets, reduction, chunk_rows)
    flat = targets.flatten()
    ignored = flat == ignore_index
    is_valid = ignored | (flat >= 0) & (flat < head.vocab.full)
    if targets.is_cpu and not torch.compiler.is_compiling():
        _check_ids(flat, is_valid, head.vocab.full, ignore_index)
    rows = hidden.reshape(-1, hidden.shape[-1])
    losses: Tensor = _TokenLosses.apply(rows, head.weight, flat, is_valid, head, chunk_rows)
    losses = losses.masked_fill(ignored, 0)
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (~ignored).sum()


def _check(hidden: Tensor, head: Head, targets: Tensor, reduction: str, chunk_rows: int) -> None:
    d = head.weight.shape[1]
    if hidden.shape != (*targets.shape, d):
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}: targets of shape {list(targets.shape)} and "
            f"a head of {d} columns need {[*targets.shape, d]}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}: token ids must be torch.int64")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: there are {', '.join(REDUCTIONS)}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}: at least one row must be decoded at once")


def _check_ids(targets: Tensor, is_valid: Tensor, vocab_size: int, ignore_index: int) -> None:
    if not is_valid.all():
        raise ValueError(
            f"target {int(targets[~is_valid][0])} is outside the vocabulary of {vocab_size} ids: "
            f"rows without a target are marked with ignore_index, {ignore_index}"
        )


class _TokenLosses(torch.autograd.Function):
    """Loss of each row [R]; NaN where the target is not valid, meaningless where it is ignored."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        is_valid: Tensor,
        head: Head,
        chunk_rows: int,
    ) -> Tensor:
        local_ids = targets - head.vocab.start
        statistics = _local_statistics(hidden, weight, local_ids, head.vocab.size, chunk_rows)
        tops, sums, target_logits = gather_over(statistics, head.axes).unbind(1)  # [p, R] each
        top, total = _merged(tops, sums)
        total = total.masked_fill(~is_valid, torch.nan)
        ctx.save_for_backward(hidden, weight, local_ids, top, total)
        ctx.head, ctx.chunk_rows = head, chunk_rows
        return (top.double() - target_logits.double().sum(0) + total.double().log()).to(top.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "vocab_parallel_cross_entropy is differentiable once: use it without create_graph"
            )
        hidden, weight, local_ids, top, total = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(wide(hidden)) if need_hidden else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        row_chunks, id_chunks = _chunks(hidden, ctx.head.vocab.size, ctx.chunk_rows)
        for ids in id_chunks:
            d_ids = None if d_weight is None else wide(d_weight[ids])
            for rows in row_chunks:
                logits = _product(hidden[rows], weight[ids].T)
                columns = _columns(local_ids[rows] - ids.start, logits.shape[1])
                d_logits = _to_gradient(logits, columns, top[rows], total[rows], grads[0][rows])
                if d_hidden is not None:
                    d_hidden[rows] += _product(d_logits, weight[ids])
                if d_ids is not None:
                    d_ids += _product(d_logits.T, hidden[rows])
            if d_weight is not None and d_ids is not None:
                d_weight[ids] = d_ids
        if d_hidden is not None:
            d_hidden = reduce_over(d_hidden, ctx.head.axes).to(hidden.dtype)
        return d_hidden, d_weight, None, None, None, None


def _local_statistics(
    hidden: Tensor, weight: Tensor, local_ids: Tensor, n_ids: int, chunk_rows: int
) -> Tensor:
    """[3, R]: maximum of the rank's n logits, Σ exp(logit - maximum), and the target's logit.

    The last is 0 where the target is another rank's. A rank may have no ids, and a sum of 0.
    """
    row_chunks, id_chunks = _chunks(hidden, n_ids, chunk_rows)
    tops = wide(hidden.new_empty(0)).new_zeros(max(1, len(id_chunks)), hidden.shape[0])
    tops.fill_(torch.finfo(tops.dtype).min)
    sums, target_logit = torch.zeros_like(tops), torch.zeros_like(tops[0])
    for index, ids in enumerate(id_chunks):
        for rows in row_chunks:
            logits = _product(hidden[rows], weight[ids].T)
            column, is_here = _columns(local_ids[rows] - ids.start, logits.shape[1])
            target_logit[rows] += logits.gather(1, column).where(is_here, 0)[:, 0]
            # Never below the lowest finite number: subtracting a maximum of -inf would give NaN.
            top = torch.maximum(tops[index, rows], logits.amax(1))
            tops[index, rows] = top
            sums[index, rows] = logits.sub_(top[:, None]).exp_().sum(1)
    return torch.stack((*_merged(tops, sums), target_logit))


def _merged(tops: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum, Σ exp(logit - maximum)) [R] of n parts [n, R]: few, so float64 costs nothing."""
    top = tops.amax(0)
    scales = (tops.double() - top.double()).exp()
    return top, (sums * scales).sum(0).to(sums.dtype)


def _to_gradient(
    logits: Tensor, columns: tuple[Tensor, Tensor], top: Tensor, total: Tensor, grads: Tensor
) -> Tensor:
    """Gradient to a chunk of logits [rows, ids], in their memory."""
    column, is_here = columns
    grads = grads[:, None]
    logits.sub_(top[:, None]).exp_().mul_(grads / total[:, None])
    return logits.scatter_(1, column, logits.gather(1, column) - grads * is_here)


def _chunks(hidden: Tensor, n_ids: int, chunk_rows: int) -> tuple[list[slice], list[slice]]:
    """Slices of the rows and of the ids.

    A pair of them makes at most CHUNK_NUMBERS logits; a slice of ids has at most as many weights.
    """
    n_rows, d = hidden.shape
    return _slices(n_rows, chunk_rows), _slices(
        n_ids, max(1, CHUNK_NUMBERS // max(d, min(n_rows, chunk_rows)))
    )


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _columns(local_ids: Tensor, n_ids: int) -> tuple[Tensor, Tensor]:
    """(column of each id among `n_ids`, or 0; whether it is there), [R, 1] each."""
    is_here = (local_ids >= 0) & (local_ids < n_ids)
    return local_ids.where(is_here, 0)[:, None], is_here[:, None]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, or in float64 for inputs of that. Autocast would round it."""
    with torch.autocast(a.device.type, enabled=False):
        if b.is_cuda and b.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
        return wide(a) @ wide(b)

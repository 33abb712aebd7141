"""The head's statistics of rows in one buffer, so that one copy brings them to the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..parallel.head_reduce import HeadResult
from ..parallel.packing import Field, RowLayout
from .limits import ROW_SCALARS


@dataclass(frozen=True)
class LensRows:
    """Statistics of rows of any shape, k candidates each; the fields of a `Trace`."""

    token_ids: Tensor  # [..., k] int64, best first
    logprobs: Tensor  # [..., k] float32
    entropy: Tensor  # [...] float32, nats
    target_logprob: Tensor  # [...] float32
    target_rank: Tensor  # [...] int64
    kl_to_final: Tensor  # [...] float32, nats


def _layout(top_k: int) -> RowLayout:
    return RowLayout(
        (
            Field("token_ids", torch.int64, top_k),
            Field("target_rank", torch.int64),
            Field("logprobs", torch.float32, top_k),
            Field("entropy", torch.float32),
            Field("target_logprob", torch.float32),
            Field("kl_to_final", torch.float32),
        )
    )


def record_width(top_k: int) -> int:
    """int32 numbers per row."""
    return 2 * top_k + ROW_SCALARS


def pack_rows(result: HeadResult, top_k: int) -> Tensor:
    """The best top_k of each row and its other statistics: [R, width] int32, floats as bits."""
    values = vars(result)
    best = {name: values[name][:, :top_k] for name in ("token_ids", "logprobs")}
    return _layout(top_k).pack(values | best)


def unpack_rows(packed: Tensor) -> LensRows:
    """The inverse of `pack_rows`, for rows of any shape [..., width]."""
    return LensRows(**_layout((packed.shape[-1] - ROW_SCALARS) // 2).unpack(packed))


def first_not_finite(packed: Tensor) -> tuple[int, int] | None:
    """(n, p) of a row, of rows [N, P, width] on the host, that is not finite; None if all are.

    Ids with a logit of -inf have no probability and do no harm: what counts is the best log-prob,
    which shows the log-sum-exp, the entropy, and KL, which shows the final layer's row, too. The
    row is the first that is not finite by itself, if there is one.
    """
    columns = _telling_columns((packed.shape[-1] - ROW_SCALARS) // 2)
    is_finite = np.isfinite(packed.numpy()[..., columns].view(np.float32))
    if is_finite.all():
        return None
    by_itself = is_finite[..., :-1].all(-1)
    n, p = np.argwhere(~(is_finite.all(-1) if by_itself.all() else by_itself))[0].tolist()
    return n, p


@lru_cache
def _telling_columns(top_k: int) -> Any:
    """Where packed rows have the numbers that `first_not_finite` looks at."""
    layout = _layout(top_k)
    return np.array([layout.start(name) for name in ("logprobs", "entropy", "kl_to_final")])


def best_candidates(packed: Tensor, top_k: int) -> Tensor:
    """Rows [N, P, width] with the best top_k of their candidates alone."""
    held = _layout((packed.shape[-1] - ROW_SCALARS) // 2)
    if held.width == record_width(top_k):
        return packed
    values = held.unpack(packed.flatten(0, 1))
    best = {name: values[name][:, :top_k] for name in ("token_ids", "logprobs")}
    return _layout(top_k).pack(values | best).unflatten(0, packed.shape[:2])

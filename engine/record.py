"""The head's statistics of rows in one buffer, so that one copy brings them to the host."""

from __future__ import annotations

from dataclasses import dataclass

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


def best_candidates(packed: Tensor, top_k: int) -> Tensor:
    """Rows [N, P, width] with the best top_k of their candidates alone."""
    held = _layout((packed.shape[-1] - ROW_SCALARS) // 2)
    if held.width == record_width(top_k):
        return packed
    values = held.unpack(packed.flatten(0, 1))
    best = {name: values[name][:, :top_k] for name in ("token_ids", "logprobs")}
    return _layout(top_k).pack(values | best).unflatten(0, packed.shape[:2])

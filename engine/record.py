"""What the head said of rows, packed into one buffer so that one copy brings it to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.head_reduce import Winners
from .limits import ROW_SCALARS


@dataclass(frozen=True)
class Reading:
    """Any shape of rows, k winners each; the fields of a `Trace`."""

    token_ids: Tensor  # [..., k] int64
    logprobs: Tensor  # [..., k] float32
    entropy: Tensor  # [...] float32
    target_logprob: Tensor  # [...] float32
    target_rank: Tensor  # [...] int64
    kl_to_final: Tensor  # [...] float32


def width(top_k: int) -> int:
    """int32 numbers a row."""
    return 2 * top_k + ROW_SCALARS


def pack(winners: Winners, top_k: int) -> Tensor:
    """The first top_k winners and what is said of each row: [R, width] int32, floats as bits."""
    floats = torch.cat(
        (
            winners.logprobs[:, :top_k],
            winners.entropy[:, None],
            winners.target_logprob[:, None],
            winners.kl_to_reference[:, None],
        ),
        -1,
    )
    ids = torch.cat((winners.token_ids[:, :top_k], winners.target_rank[:, None]), -1)
    return torch.cat((ids.to(torch.int32), floats.view(torch.int32)), -1)


def unpack(packed: Tensor) -> Reading:
    """The inverse of `pack`, of rows of any shape [..., width]."""
    top_k = (packed.shape[-1] - ROW_SCALARS) // 2
    ids = packed[..., : top_k + 1].long()
    floats = packed[..., top_k + 1 :].contiguous().view(torch.float32)
    return Reading(
        token_ids=ids[..., :top_k],
        logprobs=floats[..., :top_k],
        entropy=floats[..., top_k],
        target_logprob=floats[..., top_k + 1],
        target_rank=ids[..., top_k],
        kl_to_final=floats[..., top_k + 2],
    )

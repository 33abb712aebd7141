"""The RMSNorm of a model, which edits what it reads and what it writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.edits import Edits
from ..kernels.rmsnorm_steer import rmsnorm_steer


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm_steer(x, self.weight, self.eps)[0]

    def of_sum(
        self,
        x: Tensor,
        residual: Tensor | None,
        *,
        before: Edits | None = None,
        after: Edits | None = None,
        h_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, the sum), both edited on the way: one pass for all."""
        return rmsnorm_steer(
            x, self.weight, self.eps, residual=residual, before=before, after=after, h_out=h_out
        )

    def edited(self, x: Tensor, edits: Sequence[Edits], residual: Tensor | None = None) -> Tensor:
        """x + residual with its edits, one after another; x itself where there is neither.

        It runs the norm's kernel, which edits what it reads, and discards the norm.
        """
        for edit in edits:
            x, residual = self.of_sum(x, residual, before=edit)[1], None
        return x if residual is None else x + residual

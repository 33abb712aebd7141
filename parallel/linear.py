"""Linear layers whose weight is split over ranks (Shoeybi et al., arXiv 1909.08053).

Full:    y = x · Wᵀ + b                         x [..., in], W [out, in]
Column:  W split over `out`: y_r = x · W_rᵀ + b_r, no communication forward
Row:     W split over `in`:  y = Σ_r x_r · W_rᵀ + b, one all-reduce forward

A column layer followed by a row layer needs one all-reduce for both. Backward, the column layer
sums the gradient of x over ranks and the row layer passes its gradient through.
"""

from __future__ import annotations

from torch import Tensor, empty, nn

from ..kernels.few_rows_linear import linear
from .collectives import copy_to_ranks, reduce_from_ranks
from .group import TensorParallel


class _ShardedLinear(nn.Module):
    def __init__(
        self, in_size: int, out_size: int, *, bias: bool, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.weight = nn.Parameter(empty(out_size, in_size))
        self.bias = nn.Parameter(empty(out_size)) if bias else None

    def extra_repr(self) -> str:
        out_size, in_size = self.weight.shape
        rank, size = self.parallel.rank, self.parallel.size
        return f"{in_size}, {out_size}, bias={self.bias is not None}, rank={rank}/{size}"


class ColumnLinear(_ShardedLinear):
    """This rank's `out_size` output features: x [..., in] the same on each rank -> [..., out]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(copy_to_ranks(x, self.parallel), self.weight, self.bias)


class RowLinear(_ShardedLinear):
    """This rank's `in_size` input features: x [..., in] -> [..., out], summed over ranks.

    The bias is whole on each rank and added once, after the sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = reduce_from_ranks(linear(x, self.weight), self.parallel)
        return y if self.bias is None else y + self.bias

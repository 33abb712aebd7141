"""Directions from the states of pairs: a mean, a principal component, a linear probe."""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("mean_diff", "pca", "logistic")


def direction(gap: Tensor, sides: Tensor, method: str) -> Tensor:
    """The vector [d] float32 of one tap by one of METHODS.

    gap [d]: the mean difference of the sides. sides [2, N, d]: the states, for a method that fits
    them.
    """
    if method == "mean_diff":
        return gap.float()
    along = _first_component(sides) if method == "pca" else _probe(sides)
    return (along * (gap @ along)).float()  # the product also turns it towards the gap


def _first_component(sides: Tensor) -> Tensor:
    """The unit vector [d] along which the gaps are largest, from the smaller of D Dᵀ and DᵀD."""
    gaps = (sides[0] - sides[1]).double()
    n, d = gaps.shape
    if n < d:
        along = gaps.T @ torch.linalg.eigh(gaps @ gaps.T).eigenvectors[:, -1]
    else:
        along = torch.linalg.eigh(gaps.T @ gaps).eigenvectors[:, -1]
    return _unit(along)


def _probe(sides: Tensor) -> Tensor:
    """Unit weights [d] of a logistic regression on the states, scaled to a mean length of 1."""
    from sklearn.linear_model import LogisticRegression

    states = sides.double().flatten(0, 1)
    states = states / states.norm(dim=-1).mean()
    is_matching = torch.arange(2).repeat_interleave(sides.shape[1]) == 0
    # small gaps give small gradients from the start on: the usual tolerance would stop there
    probe = LogisticRegression(tol=1e-8, max_iter=1000).fit(states.numpy(), is_matching.numpy())
    return _unit(torch.from_numpy(probe.coef_[0]))


def _unit(x: Tensor) -> Tensor:
    """x at unit length; zeros stay zeros, as where no state differs."""
    length = x.norm()
    return x / length if length > 0 else x

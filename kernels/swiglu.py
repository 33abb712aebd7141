"""Gated activation of the MLP (Shazeer, arXiv 2002.05202): silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2f], gate first -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up

"""Short names that tell models apart by their shape and their weights."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.norm import RMSNorm
from ..model.transformer import Transformer

# The keys of a config that decide which function the weights are.
SIZES = tuple("architecture vocab_size d n_layers n_heads n_kv_heads head_dim ffn_size".split())


def fingerprint(config: ModelConfig, probe: Tensor) -> str:
    """16 hex digits that tell models apart.

    probe: a small float32 tensor that the caller takes from the weights, the same part each time.
    The digits depend on the architecture's name and sizes (SIZES) and on the probe's bytes: any
    change of those numbers, rounding to another dtype included, gives another fingerprint. Weights
    outside the probe do not count, nor does the device.
    """
    sizes = json.dumps({name: getattr(config, name) for name in SIZES})
    numbers = probe.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4")
    return hashlib.sha256(sizes.encode() + numbers.tobytes()).hexdigest()[:16]


def model_fingerprint(model: Transformer) -> str:
    """The fingerprint of a model's norms, which every rank holds whole; alike in any dtype."""
    norms: list[Tensor] = [m.weight for m in model.modules() if isinstance(m, RMSNorm)]
    # in bfloat16, so that a model is the same in whichever dtype it is loaded
    return fingerprint(model.config, torch.cat(norms).bfloat16().float().cpu())

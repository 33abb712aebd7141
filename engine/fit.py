"""Do these requests fit this device, and how many of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model.config import ModelConfig
from ..parallel.collectives import all_gather
from ..parallel.group import TensorParallel
from .lens_plan import LensPlan
from .limits import MOST_BATCH
from .plan import DeviceType, Plan, device_memory_bytes, plan
from .request import Request


@dataclass(frozen=True)
class Target:
    """The ranks and the device that requests are to run on, and the weights' dtype."""

    parallel: TensorParallel
    device: torch.device
    dtype: torch.dtype

    @property
    def device_type(self) -> DeviceType:
        return "cuda" if self.device.type == "cuda" else "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def plan_requests(
    config: ModelConfig,
    requests: Sequence[Request],
    target: Target,
    *,
    batch: int,
    capture: bool = True,
) -> Plan:
    """The memory of `batch` of the requests at once, each as long as the longest.

    Their prompts must be token ids. Raises ValueError for a lens that the model does not have and
    for more positions than its context.
    """
    lenses = [request.lens for request in requests if request.lens is not None]
    for lens in lenses:
        lens.check(config)
    n_prompt = max(len(request.prompt) for request in requests)
    n_new = max(max(0, request.max_new_tokens) for request in requests)
    context = max(len(r.prompt) + max(0, r.max_new_tokens) for r in requests)
    read = LensPlan.of(lenses, config) if lenses else None
    return plan(
        config,
        ranks=target.parallel.size,
        context=context,
        batch=batch,
        taps=0 if read is None else len(read.taps),
        top_k=1 if read is None else read.top_k,
        dtype=target.dtype_name,
        device_type=target.device_type,
        deferred=read is not None and read.deferred,
        prompt=n_prompt,
        reads_prompt=any(lens.positions in ("all", "prompt") for lens in lenses),
        # no step is captured for one new token
        capture=capture and n_new > 1,
    )


def largest_batch(
    config: ModelConfig, requests: Sequence[Request], target: Target, *, capture: bool = True
) -> int:
    """How many of the requests to run at once: all, or as many as fit, but at most MOST_BATCH.

    The model is loaded already. At least 1; the same on every rank.
    """
    batch = min(len(requests), MOST_BATCH)
    if batch == 1:
        return 1
    free_bytes = device_memory_bytes(target.device)
    while batch > 1:
        planned = plan_requests(config, requests, target, batch=batch, capture=capture)
        # a GPU's memory is all of it; of a CPU's, what the weights have taken is no longer free
        loaded = 0 if target.device_type == "cuda" else planned.weights_bytes
        if planned.total_bytes - loaded <= free_bytes:
            break
        batch //= 2
    ranks = all_gather(torch.tensor(batch, device=target.device), target.parallel)
    return int(ranks.min())

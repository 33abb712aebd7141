"""A copy from the device to the host that is not waited for when it is made."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A device tensor on its way to the host; `wait` gives it once it is there."""

    def __init__(self, source: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not source.is_cuda:
            self._target = source.clone()
            return
        self._target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._target.copy_(source, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._target

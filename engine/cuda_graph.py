"""CUDA work recorded once as a graph, to be replayed, and the clean-up where that fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch


class CaptureFailed(Exception):
    """Raised for work that can run but cannot be captured. The message says why in one line."""


def captured(
    device: torch.device, warm_up: Callable[[], None], run: Callable[[], None]
) -> torch.cuda.CUDAGraph:
    """The graph of `run`, whose work is recorded and not executed.

    warm_up runs the same work first: whatever is made once, such as compiled kernels and handles,
    must exist before. Its errors are raised unchanged. Raises CaptureFailed where RuntimeError
    stops the capture itself; the process can then go on, and capture other work.
    """
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    try:
        # Around the capture, too: if it cannot be ended, `torch.cuda.graph` does not restore the
        # stream that was current before it, and all later work would go to the side stream.
        with torch.cuda.stream(side):
            return _recorded(device, side, warm_up, run)
    finally:
        current.wait_stream(side)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: whatever PyTorch keeps per stream is kept once."""
    return torch.cuda.Stream(device)


def _recorded(
    device: torch.device,
    side: torch.cuda.Stream,
    warm_up: Callable[[], None],
    run: Callable[[], None],
) -> torch.cuda.CUDAGraph:
    # PyTorch keeps a cuBLAS workspace for every stream that ran a product. Replays would go on
    # writing to the warm-up's, though it may be freed meanwhile (`torch.compile` does); and one
    # that a capture leaves lies in its graph's memory, which the next capture must not use. So all
    # are dropped in between: every graph then has a workspace that is freed with it.
    _clear_workspaces()
    try:
        warm_up()
        side.synchronize()  # an error of the device is raised here, where nothing is captured yet
        _clear_workspaces()
        return _record(device, side, run)
    finally:
        _clear_workspaces()


def _clear_workspaces() -> None:
    torch._C._cuda_clearCublasWorkspaces()


def _record(
    device: torch.device, side: torch.cuda.Stream, run: Callable[[], None]
) -> torch.cuda.CUDAGraph:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    reason = ""
    try:
        # other threads, e.g. one that pins a data loader's memory, may call CUDA meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            try:
                run()
            except RuntimeError as error:
                reason = str(error)  # ending the capture raises another error, which hides this one
                raise
    except RuntimeError as error:
        _close(device, pool)
        raise CaptureFailed((reason or str(error)).partition("\n")[0]) from error
    return graph


def _close(device: torch.device, pool: tuple[int, int]) -> None:
    """Tell PyTorch that a capture is over, where it failed to end it.

    Otherwise its allocator would refuse to free cached memory, and its generator to draw numbers,
    for as long as the process lives.
    """
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:  # it was ended, or never began
        return
    torch._C._cuda_releasePool(device.index, pool)
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())

"""How kernels are started: on their tensors' device, with a configuration that suits the chip.

Tuning is bounded: a launcher offers a short list of configurations, the first call of a kind
times them, and the choice is kept for the process. Nothing is timed while a CUDA graph is being
captured, nor where results must be the same to the bit on every rank (norms): those take
the first configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .language import triton

TIMED_RUNS = 5


@dataclass(frozen=True)
class Chip:
    """What a launcher must know of a GPU: 10 * compute capability, and how many processors."""

    capability: int
    processors: int


@dataclass(frozen=True)
class Config:
    """Tile sizes by their meaning to the kernel, and Triton's own two options."""

    tile: tuple[int, ...]
    warps: int
    stages: int = 1


OnLaunch = Callable[..., None]
_pretended: tuple[Chip, OnLaunch] | None = None
_chosen: dict[Hashable, Config] = {}


def chip_of(device: torch.device) -> Chip:
    if _pretended is not None:
        return _pretended[0]
    return _cuda_chip(device) if device.type == "cuda" else Chip(0, 4)  # 4: in the interpreter


@lru_cache
def fewest_parts(tiles: int, most: int, places: int, good: float) -> int:
    """The fewest parts a tile, up to `most`, with which all programs fill waves of `places`.

    Good enough is that share of the best fill there is.
    """

    def fill(parts: int) -> float:
        programs = tiles * parts
        return programs / (-(-programs // places) * places)

    enough = good * max(fill(parts) for parts in range(1, most + 1))
    return next(parts for parts in range(1, most + 1) if fill(parts) >= enough)


@lru_cache
def _cuda_chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on the device of its first tensor; nothing happens for an empty grid."""
    if 0 in grid:
        return
    if _pretended is not None:
        _pretended[1](kernel, arguments, options)
        return
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def choose(
    key: Hashable, device: torch.device, configs: Sequence[Config], run: Callable[[Config], None]
) -> Config:
    """The fastest of `configs`, timed with `run` when `key` first comes on this device."""
    if _pretended is not None:
        for config in configs:
            run(config)
    if len(configs) == 1 or device.type != "cuda":
        return configs[0]
    known = _chosen.get((key, device))
    if known is None:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        known = min(configs, key=lambda config: _milliseconds(lambda: run(config)))
        _chosen[key, device] = known
    return known


def _milliseconds(run: Callable[[], None]) -> float:
    run()  # compiles
    times = []
    for _ in range(TIMED_RUNS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times)


@contextmanager
def pretending(chip: Chip, on_launch: OnLaunch) -> Iterator[None]:
    """Hand every launch, for every configuration, to on_launch(kernel, arguments, options).

    With it the kernels can be compiled, on meta tensors, for a GPU that is not there.
    """
    global _pretended
    before = _pretended
    _pretended = (chip, on_launch)
    try:
        yield
    finally:
        _pretended = before


def rows_of(x: Tensor) -> Tensor:
    """[..., n] as [R, n] with adjacent columns: a view wherever strides allow."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def wide(x: Tensor) -> Tensor:
    """In the dtype of a reference's inner arithmetic: float32, or float64 for inputs of that."""
    return x if x.dtype == torch.float64 else x.float()


def block_and_warps(d: int, most_warps: int) -> dict[str, int]:
    """For kernels that hold one row of d numbers a program: 16 a thread where warps allow."""
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": max(1, min(most_warps, block // 512))}

"""How kernels are started: on their tensors' device, with a configuration that suits the chip.

The device is asked what its chip holds. Tuning is bounded: a launcher offers a short list of
configurations, the first call of a kind times them on the device alone, and the choice is kept
for the process. Nothing is timed while a CUDA graph is being captured, and only configurations
that give the same bits are offered together: a timing must never change a model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .triton_shim import triton

TIMED_RUNS = 5
# Device cycles to sleep while the host launches what is timed: about a millisecond, then more.
SLEEP_CYCLES, MOST_SLEEP_CYCLES = 2**21, 2**31
# Shared memory that one program may take, by compute capability (CUDA programming guide, table of
# technical specifications): for chips that are only pretended. A processor has RESERVED_BYTES
# more, and reserves as much for each program that it holds.
PUBLISHED_SHARED_KIB = {
    80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99,
}  # fmt: skip
LEAST_SHARED_KIB = 99
RESERVED_BYTES = 1024


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that launchers depend on.

    capability: 10 * compute capability. shared_bytes: the most that one program may take of a
    processor's shared memory; by default the figure published for the capability.
    """

    capability: int
    processors: int
    shared_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.shared_bytes:
            kib = PUBLISHED_SHARED_KIB.get(self.capability, LEAST_SHARED_KIB)
            object.__setattr__(self, "shared_bytes", 1024 * kib)

    @property
    def has_wide_products(self) -> bool:
        """Whether warp groups multiply from shared memory, which leaves registers free (9.x to
        11.x: Hopper and the Blackwells of data centres, which also have bulk tensor loads).
        """
        return 90 <= self.capability < 120

    def resident(self, program_bytes: int) -> int:
        """How many programs of so much shared memory a processor holds at once, down to 0."""
        if program_bytes > self.shared_bytes:
            return 0
        return (self.shared_bytes + RESERVED_BYTES) // (program_bytes + RESERVED_BYTES)


@dataclass(frozen=True)
class Config:
    """Tile sizes by their meaning to the kernel, and Triton's own two options."""

    tile: tuple[int, ...]
    warps: int
    stages: int = 1


OnLaunch = Callable[..., None]
_pretended: tuple[Chip, OnLaunch] | None = None
_chosen: dict[tuple[Hashable, torch.device], Config] = {}


def chip_of(device: torch.device) -> Chip:
    if _pretended is not None:
        return _pretended[0]
    return _cuda_chip(device) if device.type == "cuda" else Chip(0, 4)  # 4: in the interpreter


@lru_cache
def _cuda_chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    return Chip(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


@lru_cache
def fewest_parts(tiles: int, most: int, resident: int, good: float) -> int:
    """The fewest parts per tile, up to `most`, that fill at least `good` of the best occupancy.

    The occupancy of a number of parts is its programs over the waves of `resident` that they take.
    """

    def fill(parts: int) -> float:
        programs = tiles * parts
        return programs / (-(-programs // resident) * resident)

    enough = good * max(fill(parts) for parts in range(1, most + 1))
    return next(parts for parts in range(1, most + 1) if fill(parts) >= enough)


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
    """The fastest of `configs` on the device, timed with `run` when `key` first comes there.

    The first of them where nothing can be timed: in a capture, and where every launch blocks.
    """
    if _pretended is not None:
        for config in configs:
            run(config)
    if len(configs) == 1 or device.type != "cuda":
        return configs[0]
    if (key, device) not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        with nullcontext() if device.index is None else torch.cuda.device(device):
            times = {config: _device_ms(partial(run, config)) for config in configs}
        known = {config: ms for config, ms in times.items() if ms is not None}
        is_timed = len(known) == len(configs)
        _chosen[key, device] = min(known, key=lambda c: known[c]) if is_timed else configs[0]
    return _chosen[key, device]


def _device_ms(run: Callable[[], None]) -> float | None:
    """The shortest of several runs on the device, whatever time the host takes to launch it.

    The device is put to sleep first. A run counts only if the device still slept when the host had
    launched all of it; otherwise it sleeps longer. None where it never sleeps long enough.
    """
    run()  # compiles
    times: list[float] = []
    cycles = SLEEP_CYCLES
    while len(times) < TIMED_RUNS:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        run()
        stop.record()
        was_launched_in_time = not start.query()
        stop.synchronize()
        if was_launched_in_time:
            times.append(start.elapsed_time(stop))
        elif cycles >= MOST_SLEEP_CYCLES:
            return None
        else:
            cycles *= 4
    return min(times)


def chosen_configs() -> dict[str, str]:
    """The configurations chosen by timing in this process, by what they were chosen for."""
    return {f"{key} on {device}": str(config) for (key, device), config in _chosen.items()}


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
    """x in the dtype of a reference's inner arithmetic: float64 for float64, else float32."""
    return x if x.dtype == torch.float64 else x.float()


def block_and_warps(d: int, most_warps: int) -> dict[str, int]:
    """Options of kernels that hold a row of d numbers per program: 16 per thread if warps allow."""
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": max(1, min(most_warps, block // 512))}

"""Arms timed by turns in one process, and the rates of this machine that they are held against.

On CUDA an arm is captured into a graph that runs it once on each of several sets of inputs, so
that neither the host's launching nor what lies in the cache from the last run is measured. Before
each replay a large buffer is *read*: the cache then holds clean lines. Were it written, writing
those lines back would be charged to an arm that only reads. What an arm leaves in the cache
unwritten is small beside the bytes of all sets. An arm that cannot be captured (it waits for
results on the host) is launched one by one, and its `how` says so.

On a CPU: one thread, the host's clock, one set of inputs a run. Small sets stay in its caches, so
that a share of the bandwidth may pass 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .report import reset_peak, resident_bytes

Run = Callable[[Any], Any]  # an arm, given one set of inputs
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
# All sets together; more than caches hold by far.
SET_BYTES = {"cuda": 2 * 2**30, "cpu": 2**28}
MOST_SETS = {"cuda": 32, "cpu": 8}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Times:
    """Of one run of an arm."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    how: str  # "graph", "launched" or "cpu"


@dataclass(frozen=True)
class Rates:
    """What this machine does at most, measured on random data."""

    copy_bytes_per_s: float  # bytes read plus bytes written
    matrix_flop_per_s: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """On two threads of a shared machine, times vary too much to compare."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_count(bytes_each: int, device: torch.device) -> int:
    wanted = -(-SET_BYTES[device.type] // max(1, bytes_each))
    return min(MOST_SETS[device.type], wanted)


def interleaved(
    arms: dict[str, Run], sets: Sequence[Any], device: torch.device, seconds: float
) -> dict[str, Times]:
    """Time every arm on the sets of inputs, by turns, for about so many seconds in all."""
    timers = {
        name: _cuda_timer(run, sets, device) if device.type == "cuda" else _CpuTimer(run, sets)
        for name, run in arms.items()
    }
    started = time.perf_counter()
    for timer in timers.values():
        timer.once()
    synchronize(device)
    a_round = time.perf_counter() - started
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / a_round)))
    names = list(timers)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:  # none always follows the same one
            timers[name].once()
    synchronize(device)
    return {name: _summary(timer.samples_ms()[1:], timer.how) for name, timer in timers.items()}


def _summary(samples_ms: list[float], how: str) -> Times:
    p20, _, _, p80 = statistics.quantiles(samples_ms, n=5, method="inclusive")
    return Times(p20, statistics.median(samples_ms), p80, len(samples_ms), how)


class _CpuTimer:
    how = "cpu"

    def __init__(self, run: Run, sets: Sequence[Any]) -> None:
        self._run, self._sets, self._samples = run, sets, list[float]()

    def once(self) -> None:
        given = self._sets[len(self._samples) % len(self._sets)]
        started = time.perf_counter()
        self._run(given)
        self._samples.append((time.perf_counter() - started) * 1e3)

    def samples_ms(self) -> list[float]:
        return self._samples


class _CudaTimer:
    def __init__(self, replay: Callable[[], Any], calls: int, flush: Tensor, how: str) -> None:
        self.how = how
        self._replay, self._calls, self._flush = replay, calls, flush
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def once(self) -> None:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()  # also gives the host time to launch what follows
        start.record()
        kept = self._replay()
        stop.record()
        self._events.append((start, stop))
        del kept

    def samples_ms(self) -> list[float]:
        return [start.elapsed_time(stop) / self._calls for start, stop in self._events]


def _cuda_timer(run: Run, sets: Sequence[Any], device: torch.device) -> _CudaTimer:
    def all_sets() -> list[Any]:
        # kept until the last has run: freed at once, the next would write into the same memory,
        # which is in the cache
        return [run(given) for given in sets]

    replay, how = _captured(all_sets)
    if replay is None:
        replay = all_sets
    return _CudaTimer(replay, len(sets), _flush_buffer(device), how)


def _captured(run: Callable[[], Any]) -> tuple[Callable[[], Any] | None, str]:
    """(a graph's replay, "graph"), or (None, "launched") for work that cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, tunes and fills workspaces
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = run()
    except (RuntimeError, ValueError):
        torch.cuda.synchronize()
        return None, "launched"

    def replay() -> Any:
        graph.replay()
        return kept

    return replay, "graph"


_flush_buffers: dict[torch.device, Tensor] = {}


def _flush_buffer(device: torch.device) -> Tensor:
    if device not in _flush_buffers:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        _flush_buffers[device] = torch.zeros(max(size, 2**28) // 4, device=device)
    return _flush_buffers[device]


def measured_rates(device: torch.device, dtype: torch.dtype, seconds: float) -> Rates:
    """Copy bandwidth and matrix rate: timed as arms are, but the p20, as these are ceilings."""
    n = COPY_BYTES[device.type] // dtype.itemsize
    size = MATRIX_SIZE[device.type]
    pair = (torch.randn(n, dtype=dtype, device=device), torch.empty(n, dtype=dtype, device=device))
    matrices = torch.randn(2, size, size, dtype=dtype, device=device)
    copy = interleaved({"copy": lambda p: p[1].copy_(p[0])}, [pair], device, seconds / 2)
    product = interleaved(
        {"mm": lambda m: torch.mm(m[0], m[1])}, [matrices.unbind()], device, seconds / 2
    )
    return Rates(
        copy_bytes_per_s=2 * n * dtype.itemsize / (copy["copy"].p20_ms / 1e3),
        matrix_flop_per_s=2 * size**3 / (product["mm"].p20_ms / 1e3),
    )


def peak_extra_bytes(run: Run, given: Any, device: torch.device) -> int | None:
    """The most memory that one run holds beyond its inputs, results included.

    On a CPU it is resident memory as Linux counts it, in pages: small runs show as 0. None where
    there is no such count.
    """
    run(given)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(given)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    reset_peak()
    resident = resident_bytes("VmRSS")
    run(given)
    return max(0, resident_bytes("VmHWM") - resident)

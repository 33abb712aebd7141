"""Implementations timed by turns in one process, this machine's rates, and peaks of memory.

On CUDA a run is captured into a graph that runs it once on each of several sets of inputs, so
that neither the host's launching nor what lies in the cache from the last run is measured. Before
each replay a large buffer is *read*: the cache then holds clean lines. Were it written, writing
those lines back would be charged to a run that only reads. What a run leaves in the cache
unwritten is small beside the bytes of all sets. A run that cannot be captured (it waits for
results on the host) is launched one by one, and its `how` says so.

On a CPU: one thread, the host's clock, one set of inputs per run. Small sets stay in its caches, so
that a share of the bandwidth may pass 1.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Any], Any]  # given one set of inputs
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
# All sets together; more than caches hold by far.
SET_BYTES = {"cuda": 2 * 2**30, "cpu": 2**28}
MOST_SETS = {"cuda": 32, "cpu": 8}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Times:
    """The time that one run takes."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    how: str  # "graph", "launched" or "cpu"


@dataclass(frozen=True)
class Rates:
    """The most that this machine does, measured on random data."""

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
    runs: dict[str, Run], sets: Sequence[Any], device: torch.device, seconds: float
) -> dict[str, Times]:
    """Time every run on the sets of inputs, by turns, for about so many seconds in all."""
    timers = {
        name: _cuda_timer(run, sets, device) if device.type == "cuda" else _CpuTimer(run, sets)
        for name, run in runs.items()
    }
    started = time.perf_counter()
    for timer in timers.values():
        timer.once()
    synchronize(device)
    round_seconds = time.perf_counter() - started
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / round_seconds)))
    for name in by_turns(list(timers), rounds):
        timers[name].once()
    synchronize(device)
    return {name: _summary(timer.samples_ms()[1:], timer.how) for name, timer in timers.items()}


def by_turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name in each round, in a rotating order: none always comes first."""
    for turn in range(rounds):
        first = turn % max(1, len(names))
        yield from (*names[first:], *names[:first])


def seconds_by_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """The times of every run, by the host's clock."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for name in by_turns(list(runs), rounds):
        synchronize(device)
        started = time.perf_counter()
        runs[name]()
        synchronize(device)
        taken[name].append(time.perf_counter() - started)
    return taken


def spread(values: Sequence[float]) -> dict[str, float]:
    """The best (the least), and the 20th, 50th and 80th percentile. Two values at least."""
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"best": min(values), "p20": p20, "p50": statistics.median(values), "p80": p80}


def _summary(samples_ms: list[float], how: str) -> Times:
    found = spread(samples_ms)
    return Times(found["p20"], found["p50"], found["p80"], len(samples_ms), how)


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
    """Copy bandwidth and matrix rate: timed as runs are, but the p20, as these are ceilings."""
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
    return max(0, peak_resident_bytes(lambda: run(given)))


def peak_resident_bytes(run: Callable[[], Any]) -> int:
    """Resident memory that a call adds at its peak, as Linux counts it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory goes back first
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")

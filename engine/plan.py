"""Does a model fit, and how fast can it be at most: arithmetic on its config alone.

All figures are those of the fullest rank. Legend: see `memory.py`, which counts the memory; p
ranks, L blocks, k candidates.

    decode step reads    b (block weights + V d + B d) + cache 2 L B K S D b + taps
    decode step sends    (2 L + 1) all-reduces of B d b, candidates of its rows to p - 1 ranks

Nothing here needs torch until a device is asked for its memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..model.config import DTYPE_BYTES, ModelConfig
from . import memory as footprint
from .limits import RING_TOKENS, cache_capacity
from .memory import DeviceType, Share, Workload, even_share, fullest_share

if TYPE_CHECKING:
    import torch

GIB = 2**30


class Gpu(NamedTuple):
    """Memory in GiB: data sheets write GB, and drivers show up to 2% less (L40S: 6%, for ECC)."""

    memory_gib: float
    bandwidth_bytes_per_s: float


# NVIDIA's data sheets, of the SXM form where there are several; B200: that of the DGX B200, by 8.
GPUS = {
    "a100-40": Gpu(40, 1.555e12),
    "a100-80": Gpu(80, 2.039e12),
    "h100": Gpu(80, 3.35e12),
    "h200": Gpu(141, 4.8e12),
    "b200": Gpu(180, 8.0e12),
    "l40s": Gpu(48, 0.864e12),
    "rtx-a6000": Gpu(48, 0.768e12),
}


@dataclass(frozen=True)
class Plan:
    """Memory of the fullest rank, and what one decode step of the batch moves, sends, computes.

    lens_workspace_bytes: states on their way to the lens, and a reading of the head, which
    sampling needs too. prefill_bytes: what a prefill chunk takes beyond a reading. graph_bytes:
    what a captured decode step keeps, and nothing else can use.
    """

    config: ModelConfig
    ranks: int
    workload: Workload
    weights_bytes: int
    cache_bytes: int
    taps_bytes: int
    lens_workspace_bytes: int
    prefill_bytes: int
    graph_bytes: int
    runtime_bytes: int
    moved_bytes_per_token: int
    sent_bytes_per_token: int
    flops_per_token: int
    kept_bytes_per_token: int  # of host memory, for the trace of one request's token
    padding_bytes: int  # of weights and cache, beyond an even share: heads are whole

    @property
    def parts(self) -> dict[str, int]:
        """The memory by purpose, in bytes."""
        return {
            "weights": self.weights_bytes,
            "cache": self.cache_bytes,
            "taps": self.taps_bytes,
            "lens": self.lens_workspace_bytes,
            "prefill": self.prefill_bytes,
            "graph": self.graph_bytes,
            "runtime": self.runtime_bytes,
        }

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def tokens_per_s(self, bandwidth_bytes_per_s: float) -> float:
        """The rate of all requests together, if a step took no longer than its memory traffic."""
        return self.workload.batch * bandwidth_bytes_per_s / self.moved_bytes_per_token

    def to_dict(self) -> dict[str, Any]:
        """Its numbers by name."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return numbers | {"total_bytes": self.total_bytes}


def plan(
    config: ModelConfig,
    *,
    ranks: int,
    context: int,
    batch: int = 1,
    taps: int = 0,
    final_tapped: bool = True,
    top_k: int = 5,
    dtype: str | None = None,
    device_type: DeviceType = "cuda",
    deferred: bool = False,
    prompt: int | None = None,
    reads_prompt: bool = True,
    capture: bool = True,
) -> Plan:
    """The needs of each of `ranks` ranks to run `batch` requests of `context` positions each.

    taps: (layer, point) pairs that a lens reads, 0 for no lens; final_tapped: whether the last
    resid_post is among them (it is decoded in any case). dtype: a name, default the config's.
    deferred: the lens decodes the states of RING_TOKENS steps together. prompt: how many of the
    positions are fed at the start, default all; reads_prompt: whether the lens reads them.
    capture: whether decode steps are captured as CUDA graphs, where there is CUDA.
    Raises ValueError for more ranks than heads, and for more context than the model has.
    """
    dtype = config.dtype_name if dtype is None else dtype
    _check(config, ranks, context, batch, taps, top_k, dtype)
    decoded = taps + 1 if taps and not final_tapped else taps
    workload = Workload(
        context=context,
        capacity=cache_capacity(context, config.context, device_type),
        prompt=prompt or context,
        batch=batch,
        taps=decoded,
        top_k=top_k,
        dtype=dtype,
        device_type=device_type,
        deferred=deferred,
        reads_prompt=reads_prompt,
        captured=capture and device_type == "cuda",
    )
    return _planned(config, ranks, workload)


def _check(
    config: ModelConfig, ranks: int, context: int, batch: int, taps: int, top_k: int, dtype: str
) -> None:
    for name, value in {"ranks": ranks, "context": context, "batch": batch}.items():
        if value < 1:
            raise ValueError(f"{name} {value} is below 1")
    if taps < 0:
        raise ValueError(f"taps {taps} is below 0")
    if context > config.context:
        raise ValueError(
            f"{context} positions exceed the model's context of {config.context}: use fewer"
        )
    if not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k {top_k} is outside 1 to {config.vocab_size}")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype} is not supported: only {', '.join(DTYPE_BYTES)} are")


def _planned(config: ModelConfig, ranks: int, work: Workload) -> Plan:
    share, even = fullest_share(config, ranks), even_share(config, ranks)
    reading = footprint.reading_bytes(share, work, ranks)
    return Plan(
        config=config,
        ranks=ranks,
        workload=work,
        weights_bytes=share.parameters * work.dtype_bytes,
        cache_bytes=footprint.cache_bytes(share, work),
        taps_bytes=footprint.taps_bytes(share, work),
        lens_workspace_bytes=footprint.captured_bytes(share, work) + reading,
        prefill_bytes=max(0, footprint.prefill_bytes(share, work) - reading),
        graph_bytes=footprint.graph_bytes(share, work, ranks),
        runtime_bytes=footprint.runtime_bytes(work),
        moved_bytes_per_token=moved_bytes(share, work),
        sent_bytes_per_token=sent_bytes(share, work, ranks),
        flops_per_token=step_flops(share, work),
        kept_bytes_per_token=footprint.kept_bytes(work),
        padding_bytes=max(0, _stored_bytes(share, work) - _stored_bytes(even, work)),
    )


def _stored_bytes(share: Share, work: Workload) -> int:
    return share.parameters * work.dtype_bytes + footprint.cache_bytes(share, work)


def moved_bytes(share: Share, work: Workload) -> int:
    """Bytes that one decode step reads and writes at full context; small activations left out."""
    head = share.vocab * share.d
    weights = share.block_parameters + share.d + head + work.bucket * share.d
    # padded requests hold no positions; every request writes one
    positions = work.batch * (work.context + 1)
    cache = 2 * share.n_layers * share.kv_width * positions
    tapped = 2 * work.bucket * work.taps * share.d  # written, and read by the head
    if work.deferred and work.taps:  # once more through the ring; the head is read again for it
        tapped += tapped + head // RING_TOKENS
    return (weights + cache + tapped) * work.dtype_bytes


def sent_bytes(share: Share, work: Workload, ranks: int) -> int:
    """Bytes that this rank sends per step, counted as rings: see parallel/collectives.py."""
    hidden = work.bucket * share.d * work.dtype_bytes
    all_reduces = (2 * share.n_layers + 1) * (2 * hidden * (ranks - 1) // ranks)
    return all_reduces + work.head_rows * work.candidate_bytes * (ranks - 1)


def step_flops(share: Share, work: Workload) -> int:
    """Two FLOPs per weight and row; four per cached position and number of the queries."""
    products = work.bucket * share.block_parameters + work.head_rows * share.vocab * share.d
    attention = share.n_layers * work.batch * work.context * share.q_width
    return 2 * products + 4 * attention


def largest_group(config: ModelConfig, ranks: int) -> int:
    """The largest size of equal groups of the `ranks` ranks that can share one model each."""
    for size in range(min(ranks, config.n_heads), 0, -1):
        if ranks % size == 0:
            return size
    raise AssertionError("one rank can always hold the model")


def fewest_ranks(config: ModelConfig, workload: Workload, memory_bytes: float) -> int | None:
    """The smallest number of ranks that can share the model and fit it, if there is one."""
    for ranks in range(1, config.n_heads + 1):
        if _planned(config, ranks, workload).total_bytes <= memory_bytes:
            return ranks
    return None


def check_fits(planned: Plan, memory_bytes: float, what: str) -> None:
    """Raise ValueError, with the figures and what to do, if a rank needs more memory."""
    if planned.total_bytes <= memory_bytes:
        return
    is_gpu = planned.workload.device_type == "cuda"
    each = f"each of {planned.ranks} ranks" if planned.ranks > 1 else "it"
    has = "the GPU has" if is_gpu else "the machine has free for it"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in planned.parts.items() if size)
    ways = ["a shorter context", "a smaller batch", "fewer layers or points"]
    ranks = fewest_ranks(planned.config, planned.workload, memory_bytes)
    if ranks is not None:  # on one machine, more of them would share the same memory
        ways.insert(0, f"{ranks} ranks" if is_gpu else f"{ranks} ranks with as much each")
    raise ValueError(
        f"{what} does not fit: {each} needs {gib(planned.total_bytes)} GiB ({parts}), "
        f"{has} {gib(memory_bytes)}: use {', '.join(ways[:-1])} or {ways[-1]}"
    )


def gib(n_bytes: float) -> str:
    """Bytes as GiB, with one decimal, or two digits where that would show nothing."""
    value = n_bytes / GIB
    return f"{value:,.1f}" if value >= 0.1 or not n_bytes else f"{value:.2g}"


def device_memory_bytes(device: torch.device) -> int:
    """All of a GPU's memory; on the CPU what is available, shared by the machine's ranks."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return available_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory of this machine that is free."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) * 1024

"""Does a model fit, and how fast can it be at most: arithmetic on its config alone.

Everything is said of the fullest rank. Legend: p ranks, L blocks, d hidden size, B requests (padded
to a bucket where a decode step is captured), S positions of context, T positions a prefill chunk,
P states decoded by the lens at a position, k winners, b bytes a number. H, K, f, V: heads, key and
value heads, MLP width and vocabulary of this rank; D head size.

    decode step reads    b (block weights + V d + B d) + cache 2 L B K S D b + taps
    decode step sends    (2 L + 1) all-reduces of B d b, winners of its rows to p - 1 ranks

Nothing here needs torch until a device is asked for its memory.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from .config import DTYPE_BYTES, ModelConfig
from .limits import CAPTURED_ROWS, DECODED_POSITIONS, PREFILL_CHUNK, RING_TOKENS, ROW_SCALARS
from .sharding import placements, rank_spans

if TYPE_CHECKING:
    import torch

    from ..parallel.group import TensorParallel

GIB = 2**30
DeviceType = Literal["cuda", "cpu"]


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

# What parts of the engine were seen to take beside the tensors that are counted.
RESIDUAL_COPIES = 4  # of [B T, d] in prefill: residual, delta, normed, the all-reduce's copy
SCORE_COPIES = 1  # of attention scores in prefill, float32, where no fused kernel takes the mask
HEAD_TILE_ROWS = 128
HEAD_PROGRAMS = 132
HEAD_TILE_BYTES = 64 * 1024  # that a program of the head's kernel keeps its logits in
CPU_LOGITS_BYTES = 2**20  # a block of logits of the head's reference
CPU_LOGITS_COPIES = 6
MERGE_COPIES = 4  # of the gathered winners, while they are merged in float64
CUDA_RUNTIME_BYTES = GIB  # the context, and workspaces of cuBLAS and NCCL


@dataclass(frozen=True)
class Workload:
    """What is asked of the model. taps: states decoded a position, the final layer's among them."""

    context: int
    batch: int
    taps: int  # 0 without a lens
    top_k: int
    dtype: str
    device_type: DeviceType
    deferred: bool

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def bucket(self) -> int:
        """B: captured steps exist for powers of two."""
        is_captured = self.device_type == "cuda"
        return 1 << (self.batch - 1).bit_length() if is_captured else self.batch

    @property
    def head_rows(self) -> int:
        """Rows of a decode step's product with the head: to sample from, and the taps."""
        return self.bucket * (self.taps + 1)

    @property
    def winner_bytes(self) -> int:
        """What a rank says of one row: k ids and logits, six sums."""
        return 8 * self.top_k + 24


@dataclass(frozen=True)
class Share:
    """The fullest rank's part of the model, in numbers."""

    parameters: int
    block_parameters: int  # of all blocks together
    n_layers: int
    d: int
    q_width: int  # H D
    kv_width: int  # K D
    heads: int
    ffn: int
    vocab: int


@dataclass(frozen=True)
class Plan:
    """Memory of the fullest rank, and what one decode step of the batch moves, sends, computes."""

    config: ModelConfig
    ranks: int
    workload: Workload
    weights_bytes: int
    cache_bytes: int
    taps_bytes: int
    lens_workspace_bytes: int
    prefill_bytes: int
    runtime_bytes: int
    moved_bytes_per_token: int
    sent_bytes_per_token: int
    flops_per_token: int

    @property
    def parts(self) -> dict[str, int]:
        """What the memory is for, in bytes."""
        return {
            "weights": self.weights_bytes,
            "cache": self.cache_bytes,
            "taps": self.taps_bytes,
            "lens": self.lens_workspace_bytes,
            "prefill": self.prefill_bytes,
            "runtime": self.runtime_bytes,
        }

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def tokens_per_s(self, bandwidth_bytes_per_s: float) -> float:
        """Of all requests together, if a step took no longer than its memory traffic."""
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
) -> Plan:
    """What each of `ranks` ranks needs to run `batch` requests of `context` positions each.

    taps: (layer, point) pairs that a lens reads, 0 for no lens; final_tapped: whether the last
    resid_post is among them (it is decoded in any case). dtype: a name, default the config's.
    deferred: the lens decodes the states of RING_TOKENS steps together. Raises ValueError for
    ranks that cannot share the model, and for more context than it has.
    """
    dtype = config.dtype_name if dtype is None else dtype
    _check(config, ranks, context, batch, taps, top_k, dtype)
    decoded = taps + 1 if taps and not final_tapped else taps
    workload = Workload(context, batch, decoded, top_k, dtype, device_type, deferred)
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


def _planned(config: ModelConfig, ranks: int, workload: Workload) -> Plan:
    share = fullest_share(config, ranks)
    return Plan(
        config=config,
        ranks=ranks,
        workload=workload,
        weights_bytes=share.parameters * workload.dtype_bytes,
        cache_bytes=cache_bytes(share, workload),
        taps_bytes=taps_bytes(share, workload),
        lens_workspace_bytes=captured_bytes(share, workload)
        + head_bytes(workload)
        + merge_bytes(workload, ranks),
        prefill_bytes=prefill_bytes(share, workload),
        runtime_bytes=CUDA_RUNTIME_BYTES if workload.device_type == "cuda" else 0,
        moved_bytes_per_token=moved_bytes(share, workload),
        sent_bytes_per_token=sent_bytes(share, workload, ranks),
        flops_per_token=step_flops(share, workload),
    )


class _Place(NamedTuple):
    """All that spans depend on: a plan has no process group to make a TensorParallel of."""

    rank: int
    size: int


def fullest_share(config: ModelConfig, ranks: int) -> Share:
    """Raises ValueError where the model cannot be split over that many ranks."""
    # Every rank stores as many heads and rows of the vocabulary; an even split that does not come
    # out leaves the last rank the larger part.
    spans = rank_spans(config, cast("TensorParallel", _Place(ranks - 1, ranks)))
    sizes = {dim: span.padded for dim, span in spans.items()}
    counts = {
        name: sum(math.prod(sizes[dim] for dim in part.dims) for part in parts)
        for name, parts in placements(config).items()
    }
    return Share(
        parameters=sum(counts.values()),
        block_parameters=sum(n for name, n in counts.items() if name.startswith("blocks.")),
        n_layers=config.n_layers,
        d=config.d,
        q_width=sizes["heads"],
        kv_width=sizes["kv_heads"],
        heads=sizes["heads"] // config.head_dim,
        ffn=sizes["ffn"],
        vocab=sizes["vocab"],
    )


def cache_bytes(share: Share, work: Workload) -> int:
    """Keys and values [L, B, K, S, D]."""
    numbers = share.n_layers * work.bucket * share.kv_width * work.context
    return 2 * numbers * work.dtype_bytes


def taps_bytes(share: Share, work: Workload) -> int:
    """A step's states [B, P + 1, d] and taps [B, P, d], the ring [64, B, P, d], the record."""
    tapped = work.bucket * work.taps * share.d
    ring = RING_TOKENS * tapped if work.deferred else 0
    states = work.bucket * share.d + tapped
    record = work.bucket * work.taps * (2 * work.top_k + ROW_SCALARS)
    return (states + tapped + ring) * work.dtype_bytes + 4 * record


def chunk_tokens(work: Workload) -> int:
    """T: fewer where a lens captures, so that the captured rows B T P stay few."""
    most = CAPTURED_ROWS // (work.bucket * work.taps) if work.taps else PREFILL_CHUNK
    return max(1, min(most, PREFILL_CHUNK, work.context))


def decoded_rows(work: Workload) -> int:
    """Rows of captured states that a lens decodes at once."""
    return min(DECODED_POSITIONS, work.bucket * work.context) * work.taps


def captured_bytes(share: Share, work: Workload) -> int:
    """A chunk's captured states [B T P, d]; of those decoded at once, a copy and its norm."""
    rows = work.bucket * chunk_tokens(work) * work.taps + 2 * decoded_rows(work)
    return rows * share.d * work.dtype_bytes


def head_bytes(work: Workload) -> int:
    """What the head keeps of logits, and on CUDA the winners of each program."""
    if work.device_type == "cpu":
        return CPU_LOGITS_BYTES * CPU_LOGITS_COPIES
    rows = max(decoded_rows(work), work.head_rows)
    tiles = -(-rows // HEAD_TILE_ROWS)
    return HEAD_PROGRAMS * (tiles * HEAD_TILE_BYTES + rows * work.winner_bytes)


def merge_bytes(work: Workload, ranks: int) -> int:
    """The winners of all ranks, and what is made of them."""
    rows = max(decoded_rows(work), work.head_rows)
    return ranks * rows * work.winner_bytes * MERGE_COPIES


def prefill_bytes(share: Share, work: Workload) -> int:
    """The larger of a block's two halves, beside the residual stream."""
    rows = work.bucket * chunk_tokens(work)
    mlp = rows * 3 * share.ffn * work.dtype_bytes  # gate and up, and their product
    residual = rows * RESIDUAL_COPIES * share.d * work.dtype_bytes
    return residual + max(attention_bytes(share, work), mlp)


def attention_bytes(share: Share, work: Workload) -> int:
    """q, k, v fused, q rotated, the mixed values; mask [B, T, S] and scores [B, H, T, S]."""
    rows = work.bucket * chunk_tokens(work)
    numbers = rows * (3 * share.q_width + 2 * share.kv_width)
    scores = rows * work.context * share.heads * SCORE_COPIES
    return numbers * work.dtype_bytes + rows * work.context + 4 * scores


def moved_bytes(share: Share, work: Workload) -> int:
    """Read and written by one decode step with the context full; small activations left out."""
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
    """By this rank, as rings: see parallel/collectives.py."""
    hidden = work.bucket * share.d * work.dtype_bytes
    all_reduces = (2 * share.n_layers + 1) * (2 * hidden * (ranks - 1) // ranks)
    return all_reduces + work.head_rows * work.winner_bytes * (ranks - 1)


def step_flops(share: Share, work: Workload) -> int:
    """Two a weight and row; four a cached position, query head and its size."""
    products = work.bucket * share.block_parameters + work.head_rows * share.vocab * share.d
    attention = share.n_layers * work.batch * work.context * share.q_width
    return 2 * products + 4 * attention


def fewest_ranks(config: ModelConfig, workload: Workload, memory_bytes: float) -> int | None:
    """The smallest number of ranks that can share the model and fit it, if there is one."""
    for ranks in range(1, config.n_heads + 1):
        try:
            if _planned(config, ranks, workload).total_bytes <= memory_bytes:
                return ranks
        except ValueError:
            continue
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
    """In GiB, with one decimal, or two digits where that would show nothing."""
    value = n_bytes / GIB
    return f"{value:,.1f}" if value >= 0.1 or not n_bytes else f"{value:.2g}"


def device_memory_bytes(device: torch.device) -> int:
    """All of a GPU's memory; on the CPU what is available, shared by the machine's ranks."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return _available_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) * 1024

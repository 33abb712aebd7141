"""Where a rank's memory goes, phase by phase, in bytes: the numbers behind `plan`.

Legend: B requests (padded to a bucket where a decode step is captured), S positions of context, T
positions of a prefill chunk, which is of one request, P states read by a lens at a position, R =
64 P rows that share a reading of the head, d hidden size, b bytes per number; H, K, f, V: heads,
key and value heads, MLP width and vocabulary of this rank; D head size. Some tensors live
throughout; the others live in one phase at a time: a prefill chunk, or a reading of the head.

Each sum names the tensors that are alive at the phase's peak. On a CPU the references run, whose
intermediate results are tensors too. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..kernels.blocks import (
    HEAD_LEAST_ROWS,
    HEAD_MOST_SHARES,
    HEAD_PROGRAMS,
    HEAD_ROW_BYTES,
    HEAD_ROWS,
    HEAD_TILE_BYTES,
    HEAD_TILE_ROWS,
    WIDENED_IDS,
    head_block_ids,
)
from ..model.config import DTYPE_BYTES, ModelConfig
from ..model.sharding import TensorTable, rank_spans, tensor_table
from .limits import (
    CAPTURED_ROWS,
    DECODED_POSITIONS,
    PREFILL_CHUNK,
    RING_TOKENS,
    ROW_SCALARS,
    batch_bucket,
    rounded_up,
)

DeviceType = Literal["cuda", "cpu"]

LOGITS_COPIES = 2.55  # of a block's logits in the reference: logits, room for sums, masks
ATTENTION_BUFFER_BYTES = 2**17  # of PyTorch's attention on a CPU, on two threads
MERGED_BYTES = 400  # per row while the candidates of all ranks are merged, in float64
CUDA_CONTEXT_BYTES = 2**30  # the context itself, and what NCCL keeps
CUBLAS_WORKSPACE_BYTES = 2**25  # PyTorch's choice on Hopper and Blackwell, the largest


@dataclass(frozen=True)
class Workload:
    """The work to be done. taps: states decoded per position, the final layer's among them."""

    context: int
    capacity: int  # of the cache: rounded up where steps are captured
    prompt: int  # positions fed at the start
    batch: int
    taps: int  # 0 without a lens
    top_k: int
    dtype: str
    device_type: DeviceType
    deferred: bool
    reads_prompt: bool  # whether the lens reads more of a prompt than its last position
    captured: bool  # whether decode steps are CUDA graphs

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def bucket(self) -> int:
        """B: slots, a power of two where steps are captured."""
        return batch_bucket(self.batch, self.device_type)

    @property
    def head_rows(self) -> int:
        """Rows of a decode step's product with the head: to sample from, and the taps."""
        return self.bucket * (self.taps + 1)

    @property
    def candidate_bytes(self) -> int:
        """Bytes that a rank sends per row: k ids and logits, six sums."""
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


def fullest_share(config: ModelConfig, ranks: int) -> Share:
    """The largest share of a rank: where the ranks do not divide heads or MLP, shares differ."""
    table = tensor_table(dataclasses.replace(config, n_layers=1))
    shares = {
        tuple((dim, span.padded) for dim, span in rank_spans(config, rank, ranks).items())
        for rank in range(ranks)
    }
    return max((_share(config, dict(sizes), table) for sizes in shares), key=_numbers)


def even_share(config: ModelConfig, ranks: int) -> Share:
    """A share without padding, of heads that could be cut and rows that came out even."""
    whole = {dim: span.full for dim, span in rank_spans(config, 0, 1).items()}
    cut = {dim: -(-whole[dim] // ranks) for dim in ("heads", "kv_heads", "ffn", "vocab")}
    cut["kv_heads"] = max(cut["kv_heads"], config.head_dim)
    return _share(config, whole | cut, tensor_table(dataclasses.replace(config, n_layers=1)))


def _numbers(share: Share) -> tuple[int, int]:
    return share.parameters, share.kv_width


def _share(config: ModelConfig, sizes: Mapping[str, int], table: TensorTable) -> Share:
    counts = {
        name: sum(math.prod(sizes[dim] for dim in part.dims) for part in parts)
        for name, parts in table.items()
    }
    block = sum(n for name, n in counts.items() if name.startswith("blocks."))
    return Share(
        parameters=sum(counts.values()) + (config.n_layers - 1) * block,
        block_parameters=config.n_layers * block,
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
    numbers = share.n_layers * work.bucket * share.kv_width * work.capacity
    return 2 * numbers * work.dtype_bytes


def taps_bytes(share: Share, work: Workload) -> int:
    """A step's states [B, P + 1, d] and taps [B, P, d], the ring [64, B, P, d], the record."""
    tapped = work.bucket * work.taps * share.d
    ring = RING_TOKENS * tapped if work.deferred else 0
    states = work.bucket * share.d + tapped
    record = work.bucket * (2 + work.taps * (2 * work.top_k + ROW_SCALARS))
    return (states + tapped + ring) * work.dtype_bytes + 4 * record


def chunk_tokens(work: Workload) -> int:
    """T: fewer where a lens captures, so that the captured rows T P stay few."""
    most = CAPTURED_ROWS // work.taps if work.taps else PREFILL_CHUNK
    fed = work.prompt - int(work.context > work.prompt)  # the last token is left to a step
    return max(1, min(most, PREFILL_CHUNK, fed))


def captured_bytes(share: Share, work: Workload) -> int:
    """A chunk's states [T P, d] on their way to the lens."""
    positions = chunk_tokens(work) if work.reads_prompt else 1
    return positions * work.taps * share.d * work.dtype_bytes


def reading_bytes(share: Share, work: Workload, ranks: int) -> int:
    """The larger of the lens's reading of a prompt and a decode step's reading of the head."""
    positions = chunk_tokens(work) if work.reads_prompt else 0
    prompt_rows = min(DECODED_POSITIONS, positions) * work.taps
    ring_rows = DECODED_POSITIONS * work.taps if work.deferred else 0
    return rows_reading_bytes(share, work, max(prompt_rows, ring_rows, work.head_rows), ranks)


def rows_reading_bytes(share: Share, work: Workload, rows: int, ranks: int) -> int:
    """A norm; then, beside the normed rows, the targets' logits, and after them the candidates."""
    normed = rows * share.d * work.dtype_bytes
    after = max(target_bytes(share, work, rows), head_bytes(share, work, rows, ranks))
    return max(norm_bytes(share, work, rows), normed + after)


def norm_bytes(share: Share, work: Workload, rows: int) -> int:
    """The result; on a CPU also the widened row, and two intermediate results of the norm."""
    is_wide = work.dtype_bytes == 4
    if work.device_type == "cuda":
        return rows * share.d * work.dtype_bytes
    return rows * share.d * (8 if is_wide else 12)


def target_bytes(share: Share, work: Workload, rows: int) -> int:
    """Rows of the head's weight for the targets, and their products, of two blocks of rows."""
    if not work.taps:
        return 0
    return min(rows, HEAD_ROWS) * share.d * (12 if work.dtype_bytes == 4 else 18)


def head_bytes(share: Share, work: Workload, rows: int, ranks: int) -> int:
    """Logits of a block on a CPU, of the programs' tiles on CUDA; candidates and their merging."""
    merged = rows * (MERGED_BYTES + ranks * work.candidate_bytes)
    if work.device_type == "cuda":
        tile_bytes = min(HEAD_TILE_BYTES, HEAD_ROW_BYTES * rounded_up(rows, HEAD_LEAST_ROWS))
        shares = max(HEAD_MOST_SHARES, HEAD_PROGRAMS // -(-rows // HEAD_TILE_ROWS))
        kept = 8 * rounded_up(work.top_k) + 24
        return HEAD_PROGRAMS * tile_bytes + shares * rows * kept + merged
    block = min(rows, HEAD_ROWS)
    ids = min(share.vocab, head_block_ids(block))
    if work.dtype_bytes == 4:
        return int(4 * block * ids * LOGITS_COPIES) + merged
    ids = min(ids, WIDENED_IDS)
    widened_rows, widened_ids = 4 * block * share.d, 4 * ids * share.d
    logits = 4 * block * ids
    return widened_rows + max(int(logits * LOGITS_COPIES), widened_ids + logits) + merged


def prefill_bytes(share: Share, work: Workload) -> int:
    """The larger of a block's two halves."""
    rows = chunk_tokens(work)
    return max(attention_bytes(share, work), mlp_bytes(share, work, rows))


def mlp_bytes(share: Share, work: Workload, rows: int) -> int:
    """Five states of the residual stream; gate and up [T, 2f] and the product of them."""
    ffn_widths = 3 if work.device_type == "cuda" else 4
    return rows * (5 * share.d + ffn_widths * share.ffn) * work.dtype_bytes


def attention_bytes(share: Share, work: Workload) -> int:
    """Four states of the residual stream; q, k, v fused, q rotated, attention's output and a copy.

    On CUDA also the scores' log-sum-exp [T, H] in float32; on a CPU, where every chunk but the
    first needs a mask, the mask [T, S], as bool and as numbers.
    """
    chunk = chunk_tokens(work)
    rows, span = chunk, max(chunk, work.prompt // chunk * chunk)
    states = rows * (4 * share.d + 4 * share.q_width + 2 * share.kv_width) * work.dtype_bytes
    if work.device_type == "cuda":
        return states + 4 * rows * share.heads
    seen = chunk * span * (1 + work.dtype_bytes) if span > chunk else 0
    return states + seen + ATTENTION_BUFFER_BYTES


def graph_bytes(share: Share, work: Workload, ranks: int) -> int:
    """A captured step's cuBLAS workspace, and the most that its temporaries take, in an MLP or
    while it reads the head.
    """
    if not work.captured:
        return 0
    block = mlp_bytes(share, work, work.bucket)
    reading = rows_reading_bytes(share, work, work.head_rows, ranks)
    return CUBLAS_WORKSPACE_BYTES + max(block, reading)


def runtime_bytes(work: Workload) -> int:
    """The CUDA context, which comes before any tensor, and the workspace of eager products."""
    return CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES if work.device_type == "cuda" else 0


def kept_bytes(work: Workload) -> int:
    """Host memory of a trace per position: packed rows, the position and its target."""
    return 4 * work.taps * (2 * work.top_k + ROW_SCALARS) + 16

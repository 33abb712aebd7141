"""Block sizes of the head, for its kernels and for `plan`, which counts their memory.

Nothing here needs torch, so that a plan can be made without it.
"""

from __future__ import annotations

# The reference, which runs on CPUs. Many rows share each reading (and conversion) of a block of W.
# Logits of 1 MiB stay in cache: with 2 MiB a pass takes as long and more memory, with 0.5 MiB it
# takes longer. Few rows would get blocks of many ids, too many where weights are widened.
HEAD_ROWS = 512
HEAD_LOGITS = 2**18
HEAD_FEW_ROWS, HEAD_FEW_ROWS_LOGITS = 32, 2**19  # a decode step's short passes: fewer of them
WIDENED_IDS = 2048
HEAD_SPAN_IDS = 512  # summed together; blocks are whole spans

# The kernel. A tile of logits has at least and at most so many rows, and goes through memory so
# many ids at a time, or half a tile at a time where the tile is larger than the largest of these.
HEAD_LEAST_ROWS, HEAD_TILE_ROWS = 16, 128
HEAD_TILE_IDS = 128
HEAD_ROW_BYTES = 4 * HEAD_TILE_IDS
# Registers hold no more programs per processor. Where there are two, their tiles are half as large.
PROGRAMS_PER_PROCESSOR = 2
MOST_PROCESSORS = 148  # B200
HEAD_PROGRAMS = PROGRAMS_PER_PROCESSOR * MOST_PROCESSORS
HEAD_TILE_BYTES = HEAD_ROW_BYTES * HEAD_TILE_ROWS // PROGRAMS_PER_PROCESSOR
HEAD_MOST_SHARES = 48  # of the vocabulary, where tiles of rows are many: see `head_cut.cut`


def head_block_ids(n_rows: int) -> int:
    """Number of ids whose logits are formed together for so many rows: whole spans."""
    logits = HEAD_LOGITS if n_rows > HEAD_FEW_ROWS else HEAD_FEW_ROWS_LOGITS
    return max(1, logits // n_rows // HEAD_SPAN_IDS) * HEAD_SPAN_IDS

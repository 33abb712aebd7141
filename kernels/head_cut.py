"""How the head's kernel is cut for a chip: tiles that fit it, and shares that fill its processors.

A tile of rows meets a share of the slice's ids in one piece of work. As many programs run as the
processors hold at once, each doing one piece after another in a tile of logits of its own:

    extra memory    programs · rows · width · 4         the tiles; width: ids of a tile, or half
                  + shares · R · (8 K2 + 24)            candidates and sums; K2: k, to a power of 2
                  + R · (12 k + 28)                     the results

The number of shares is the smallest that keeps the processors busy within 1/32 of the best. Where
there are enough rows for logits to be large, numbers that would need more than 1% of the memory of
bf16 logits are left out, unless all do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .blocks import HEAD_LEAST_ROWS, HEAD_TILE_IDS, HEAD_TILE_ROWS, PROGRAMS_PER_PROCESSOR
from .head_stats_kernel import N_SUMS
from .launch import Chip, Config, fewest_parts
from .triton_shim import triton

MOST_K = 64
# Rows and ids of a tile, columns per step, ids of a part, bulk loads; warps; stages. All
# configurations of an entry have the same rows, ids of a part and warps, which decide the rounding.
FEW: dict[int, tuple[Config, ...]] = {
    16: (
        Config((16, 128, 128, 64, 1), 4, 4),
        Config((16, 128, 128, 64, 0), 4, 4),
        Config((16, 128, 64, 64, 0), 4, 4),
    ),
    32: (Config((32, 128, 64, 32, 1), 4, 6), Config((32, 128, 64, 32, 0), 4, 4)),
    64: (Config((64, 256, 64, 32, 1), 8, 4), Config((64, 128, 64, 32, 0), 8, 4)),
    128: (Config((128, 128, 64, 16, 1), 8, 4), Config((128, 64, 32, 16, 0), 8, 4)),
}
MANY = (Config((128, 128, 64, 16, 1), 8, 4),)
# Twice the ids per tile, for fewer loads per operation; elsewhere than on Hopper it spills.
MANY_ON_HOPPER = (Config((128, 256, 64, 32, 1), 8, 3),)
# Ampere's registers hold the larger tile, too, without bulk loads; on later chips it spills.
MANY_ON_AMPERE = (Config((128, 128, 64, 16, 0), 8, 4),)
MANY_WITHOUT_BULK = FEW[128][1:]
# Products of float32 are three of tf32, whose operands take registers too.
FLOAT32 = {
    16: Config((16, 64, 64, 32, 0), 4, 3),
    32: Config((32, 64, 32, 32, 0), 4, 3),
    64: Config((64, 32, 32, 16, 0), 4, 3),
    128: Config((128, 32, 32, 16, 0), 8, 3),
}
INTERPRETED = (128, 64, 64, 0)
GOOD_FILL = 31 / 32
BUDGET_ROWS, BUDGET = 4096, 0.01  # of bf16 logits


@dataclass(frozen=True)
class Cut:
    """Configurations that give the same bits, best guess first, and how the work is divided."""

    configs: tuple[Config, ...]
    tile_rows: int  # of a tile: whole requests
    row_tiles: int
    share: int  # ids
    shares: int
    programs: int

    @property
    def pieces(self) -> int:
        """Pieces of work: one for every tile of rows and every share."""
        return self.row_tiles * self.shares


def configs_of(n_rows: int, dtype: torch.dtype, chip: Chip, bulk: bool) -> tuple[Config, ...]:
    """Configurations for this chip, best guess first; never empty. bulk: with bulk loads, too."""
    rows = max(HEAD_LEAST_ROWS, triton.next_power_of_2(n_rows))
    if chip.capability == 0:  # the interpreter, whose cost is the number of programs and tiles
        return (Config((min(HEAD_TILE_ROWS, rows), *INTERPRETED), 4),)
    if dtype == torch.float32:
        return (FLOAT32[min(rows, HEAD_TILE_ROWS)],)
    offered = FEW[rows] if rows <= HEAD_TILE_ROWS else _for_many_rows(chip, bulk)
    # tiles meant for bulk loads need more registers without them
    offered = tuple(c for c in offered if bulk or not c.tile[4])
    fitting = tuple(c for c in offered if chip.resident(program_bytes(c, dtype))) or offered[-1:]
    return fitting if bulk else fitting[:1]


def _for_many_rows(chip: Chip, bulk: bool) -> tuple[Config, ...]:
    if bulk:
        return MANY_ON_HOPPER if chip.capability == 90 else MANY
    return (*(MANY_ON_AMPERE if chip.capability == 80 else ()), *MANY_WITHOUT_BULK)


def program_bytes(config: Config, dtype: torch.dtype) -> int:
    """Shared memory of a program at most: x and W of one step, times the stages."""
    rows, ids, columns = config.tile[:3]
    return (rows + ids) * columns * dtype.itemsize * config.stages


def tile_width(config: Config) -> int:
    """Ids of a tile that go through memory at once: half of a large tile, which bounds it."""
    rows, ids = config.tile[:2]
    return ids // 2 if rows * ids > HEAD_TILE_ROWS * HEAD_TILE_IDS else ids


@lru_cache(maxsize=512)
def cut(
    n_rows: int,
    n_ids: int,
    rows_per_request: int,
    k: int,
    dtype: torch.dtype,
    chip: Chip,
    bulk: bool,
) -> Cut:
    """The cut for R rows, whose requests fit a tile, over a slice of n ids: neither may be 0."""
    configs = configs_of(n_rows, dtype, chip, bulk)
    first = configs[0]  # the others share the work in the same way, so that sums round alike
    rows, ids = first.tile[:2]
    tile_rows = rows if n_rows <= rows else rows // rows_per_request * rows_per_request
    row_tiles = triton.cdiv(n_rows, tile_rows)
    resident = chip.resident(program_bytes(first, dtype))
    at_once = chip.processors * max(1, min(PROGRAMS_PER_PROCESSOR, resident))

    def size(shares: int) -> int:
        programs = min(row_tiles * shares, at_once)
        return extra_bytes(n_rows, shares, programs, k, first)

    most = min(triton.cdiv(n_ids, ids), at_once)
    if n_rows >= BUDGET_ROWS:
        budget = BUDGET * 2 * n_rows * n_ids
        most = next((shares for shares in range(most, 0, -1) if size(shares) < budget), most)
    shares = fewest_parts(row_tiles, most, at_once, GOOD_FILL)
    share = 16 * triton.cdiv(triton.cdiv(n_ids, shares), 16)
    shares = triton.cdiv(n_ids, share)
    return Cut(configs, tile_rows, row_tiles, share, shares, min(row_tiles * shares, at_once))


def extra_bytes(n_rows: int, shares: int, programs: int, k: int, config: Config) -> int:
    """Memory beside x and W, results included. Samples and targets take too little to count."""
    tiles = 4 * programs * config.tile[0] * tile_width(config)
    kept = shares * n_rows * (8 * triton.next_power_of_2(k) + 4 * N_SUMS)
    return tiles + kept + n_rows * (12 * k + 28)


def in_pieces(
    n_rows: int, rows_per_request: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Rows for requests longer than a tile: (index of rows in order, its inverse, piece's size).

    Each request becomes pieces of up to HEAD_TILE_ROWS rows, each with the request's last row, the
    reference of KL, as its last.
    """
    others = rows_per_request - 1
    n_pieces = triton.cdiv(others, HEAD_TILE_ROWS - 1)
    per_piece = triton.cdiv(others, n_pieces)
    slot = torch.arange(n_pieces * (per_piece + 1), device=device).view(n_pieces, -1)
    piece = torch.arange(n_pieces, device=device)[:, None]
    row = (piece * per_piece + slot % (per_piece + 1)).clamp(max=others)
    row[:, -1] = others
    request = torch.arange(n_rows // rows_per_request, device=device)[:, None]
    index = (request * rows_per_request + row.flatten()).flatten()
    other = torch.arange(others, device=device)
    slot_of = torch.cat((other // per_piece * (per_piece + 1) + other % per_piece, slot[-1:, -1]))
    inverse = (request * slot.numel() + slot_of).flatten()
    return index, inverse, per_piece + 1

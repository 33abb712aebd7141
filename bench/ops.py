"""The operations that are measured, and their cases, claims and launches together.

python -m shardlens.bench.ops
compute-sanitizer --tool racecheck python -m shardlens.bench.ops

Run as a program, each makes small calls with all that it can be asked, for compute-sanitizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ..model.load import default_device
from .op import Case, Claim, New, Op
from .op_attention import AttentionOp
from .op_head import HeadOp
from .op_rmsnorm import NormOp
from .op_rope import RopeOp
from .op_swiglu import SwigluOp
from .shapes import GRIDS, default_dtype
from .timing import synchronize

OPS: dict[str, Op] = {
    op.name: op for op in (NormOp(), SwigluOp(), RopeOp(), AttentionOp(), HeadOp())
}
LAUNCHES = {name: launch for op in OPS.values() for name, launch in op.launches.items()}
# Sizes of a case that a CPU does in no time.
REHEARSED = {"rows": 64, "d": 128, "f": 256, "V": 2048, "H": 4, "K": 2, "T": 16, "S": 160}


def cases(
    grid: str, ops: Iterable[str] = tuple(OPS), dtype: torch.dtype = torch.bfloat16
) -> list[Case]:
    """The distinct cases of a grid, by operation. Raises ValueError for an unknown name."""
    if grid not in GRIDS:
        raise ValueError(f"grid {grid}: there are {', '.join(GRIDS)}")
    ops = tuple(ops)
    for op in ops:
        if op not in OPS:
            raise ValueError(f"operation {op}: there are {', '.join(OPS)}")
    return [case for op in ops for case in OPS[op].cases(GRIDS[grid], dtype)]


def claims(rehearsed: bool) -> list[Claim]:
    """All claims, fewest cases first, so that as many as possible are decided in the time.

    rehearsed: at shapes that a CPU does in no time.
    """
    made = sorted(
        (claim for op in OPS.values() for claim in op.claims()), key=lambda claim: len(claim.cases)
    )
    if not rehearsed:
        return made
    return [replace(claim, cases=[shrunken(case) for case in claim.cases]) for claim in made]


def shrunken(case: Case) -> Case:
    sizes = {name: min(size, REHEARSED.get(name, size)) for name, size in case.sizes.items()}
    return replace(case, sizes=sizes, dtype=torch.float32)


@torch.no_grad()
def main() -> None:
    device = default_device()
    torch.manual_seed(0)
    for op in OPS.values():
        op.sanitize(New(device, default_dtype(device)))
        synchronize(device)
    print("done")


if __name__ == "__main__":
    main()

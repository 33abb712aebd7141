"""Block sizes of the head have one home, which needs no torch and which kernels and plan read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardlens.engine import memory
from shardlens.kernels import Chip, blocks, head_cut, head_stats_reference

ROOT = Path(__file__).resolve().parents[2]
READERS = {
    "kernels/head_stats_reference.py": {"HEAD_ROWS", "WIDENED_IDS", "head_block_ids"},
    "kernels/head_cut.py": {
        "HEAD_LEAST_ROWS", "HEAD_TILE_IDS", "HEAD_TILE_ROWS", "PROGRAMS_PER_PROCESSOR"
    },
    "kernels/head_stats.py": {"HEAD_TILE_ROWS"},
    "kernels/target_logits.py": {"HEAD_ROWS"},
    "engine/memory.py": {"HEAD_ROWS", "HEAD_PROGRAMS", "HEAD_TILE_BYTES", "head_block_ids"},
}  # fmt: skip


@pytest.mark.parametrize("module", ["kernels.blocks", "engine.plan"])
def test_needs_no_torch(module: str) -> None:
    code = f"import shardlens.{module}, sys; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    seen = subprocess.run(command, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "False"


def imported(path: Path) -> set[str]:
    """Names that a file takes from `blocks`."""
    nodes = ast.walk(ast.parse(path.read_text()))
    found = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    return {a.name for n in found if str(n.module).split(".")[-1] == "blocks" for a in n.names}


@pytest.mark.parametrize("path", READERS)
def test_sizes_are_read_from_their_home(path: str) -> None:
    """And nobody has a size of the same name beside them."""
    assert imported(ROOT / path) >= READERS[path]
    tree = ast.parse((ROOT / path).read_text())
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    assigned = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    assert not assigned & set(vars(blocks))


def test_the_reference_works_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and ids of the products that are made, at its default sizes."""
    seen: set[tuple[int, int]] = set()
    module = sys.modules[head_stats_reference.__module__]
    plain = module.float_logits  # type: ignore[attr-defined]

    def noted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.add((len(x), len(weight)))
        return plain(x, weight)

    monkeypatch.setattr(module, "float_logits", noted)
    rows, n_ids = 2 * blocks.HEAD_ROWS, 2 * blocks.WIDENED_IDS
    head_stats_reference(torch.ones(rows, 2), torch.ones(n_ids, 2), k=1)
    assert seen == {(blocks.HEAD_ROWS, blocks.HEAD_LOGITS // blocks.HEAD_ROWS)}
    seen.clear()
    head_stats_reference(torch.ones(1, 2).half(), torch.ones(n_ids, 2).half(), k=1)
    assert seen == {(1, blocks.WIDENED_IDS)}


@pytest.mark.parametrize("capability, processors", [(80, 108), (90, 132), (100, 148), (120, 148)])
def test_tiles_stay_within_what_a_plan_counts(capability: int, processors: int) -> None:
    """Bytes of all programs' tiles, and shares, on chips of up to as many processors."""
    chip = Chip(capability, processors)
    assert processors <= blocks.MOST_PROCESSORS
    for n_rows in (1, 16, 17, 33, 65, 129, 1024, 5000, 20_000):
        for bulk in {False, chip.has_wide_products}:
            work = head_cut.cut(n_rows, 128_256, 1, 5, torch.bfloat16, chip, bulk)
            rows = work.configs[0].tile[0]
            assert rows >= blocks.HEAD_LEAST_ROWS and work.programs <= memory.HEAD_PROGRAMS
            tile_bytes = 4 * rows * head_cut.tile_width(work.configs[0])
            planned = min(memory.HEAD_TILE_BYTES, memory.HEAD_ROW_BYTES * rows)
            assert work.programs * tile_bytes <= memory.HEAD_PROGRAMS * planned
            tiles = -(-n_rows // blocks.HEAD_TILE_ROWS)
            most_shares = max(memory.HEAD_MOST_SHARES, memory.HEAD_PROGRAMS // tiles)
            assert work.shares <= most_shares

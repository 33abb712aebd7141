"""The grid of the microbenchmarks: shapes of published models, as each rank of a group sees them.

A rank of p holds 1 / p of the heads, of the MLP and of the vocabulary, and whole rows. Shapes that
several models or rank counts share are measured once; `used_by` names them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class ModelShape:
    d: int
    n_heads: int
    kv_heads: int
    head_dim: int
    f: int  # width of the MLP
    vocab: int
    qk_norm: bool


MODELS = {
    "llama-3.1-8b": ModelShape(4096, 32, 8, 128, 14336, 128_256, False),
    "llama-3.1-70b": ModelShape(8192, 64, 8, 128, 28672, 128_256, False),
    "qwen3-4b": ModelShape(2560, 32, 8, 128, 9728, 151_936, True),
    "qwen3-14b": ModelShape(5120, 40, 8, 128, 17408, 151_936, True),
    "qwen3-32b": ModelShape(5120, 64, 8, 128, 25600, 151_936, True),
}
OPS = ("rmsnorm_steer", "swiglu", "rope_qk", "decode_attention", "head_stats")
NORM_VARIANTS = ("norm", "residual", "edits")
TOP_K = 5
CACHE_POSITIONS = 2048  # capacity of the cache that a decode step's rope_qk writes into


@dataclass(frozen=True)
class Grid:
    """Which models and ranks, and how much work: rows, or (requests, positions)."""

    models: tuple[str, ...]
    ranks: tuple[int, ...]
    rows: tuple[int, ...]  # of norm and MLP: a decode step, a lens of all layers, prefill
    head_rows: tuple[int, ...]
    rope: tuple[tuple[int, int], ...]  # requests, new tokens
    attention: tuple[tuple[int, int], ...]  # requests, context


GRIDS = {
    "full": Grid(
        models=tuple(MODELS),
        ranks=(1, 2, 4, 8),
        rows=(8, 512, 4096, 16384),
        head_rows=(8, 64, 512, 4096),
        rope=((8, 1), (1, 4096)),
        attention=((1, 8192), (8, 1500), (8, 8192)),
    ),
    "small": Grid(  # what one CPU thread does in minutes
        models=("llama-3.1-8b", "qwen3-4b"),
        ranks=(8,),
        rows=(8, 256),
        head_rows=(8, 64),
        rope=((8, 1), (1, 256)),
        attention=((8, 1500), (8, 8192)),
    ),
}


@dataclass
class Case:
    """One operation at one shape."""

    op: str
    sizes: dict[str, int]
    variant: str = ""
    dtype: torch.dtype = torch.bfloat16
    used_by: list[str] = field(default_factory=list)  # "model/ranks"

    @property
    def shape(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.op, self.variant, self.shape)))


def cases(grid: str, ops: Iterable[str] = OPS, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """The distinct cases of a grid, by operation. Raises ValueError for an unknown name."""
    if grid not in GRIDS:
        raise ValueError(f"grid {grid}: there are {', '.join(GRIDS)}")
    found: dict[str, Case] = {}
    for op in ops:
        if op not in OPS:
            raise ValueError(f"operation {op}: there are {', '.join(OPS)}")
        for name in GRIDS[grid].models:
            for ranks in GRIDS[grid].ranks:
                for case in _of_model(op, MODELS[name], ranks, GRIDS[grid]):
                    case.dtype = dtype
                    found.setdefault(case.label, case).used_by.append(f"{name}/{ranks}")
    return list(found.values())


def _of_model(op: str, model: ModelShape, ranks: int, grid: Grid) -> Iterator[Case]:
    heads = {
        "H": model.n_heads // ranks,
        "K": max(1, model.kv_heads // ranks),  # replicated where ranks exceed them
        "D": model.head_dim,
    }
    if op == "rmsnorm_steer":
        for variant in NORM_VARIANTS:
            for rows in grid.rows:
                yield Case(op, {"rows": rows, "d": model.d}, variant)
    elif op == "swiglu":
        for rows in grid.rows:
            yield Case(op, {"rows": rows, "f": model.f // ranks})
    elif op == "rope_qk":
        for batch, tokens in grid.rope:
            capacity = max(tokens, CACHE_POSITIONS)
            sizes = {"B": batch, "T": tokens, **heads, "S": capacity}
            yield Case(op, sizes, "normed" if model.qk_norm else "plain")
    elif op == "decode_attention":
        for batch, context in grid.attention:
            yield Case(op, {"B": batch, **heads, "S": context})
    elif op == "head_stats":
        for rows in grid.head_rows:
            yield Case(op, {"rows": rows, "d": model.d, "V": -(-model.vocab // ranks), "k": TOP_K})

"""This rank's part of a tensor as a tensor of global shape, for torch.distributed.checkpoint.

A view of the same memory: what is saved is what is there, and what is loaded lands there. Where
ranks hold equal slices of one dim, that is a DTensor. A DTensor cannot say that ranks hold heads in
pieces, hold some of them twice, or split unevenly otherwise than it does itself; there it is a
`PiecedTensor`, which knows how to be saved and loaded and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .group import TensorParallel
from .spans import Span


def mesh_of(parallel: TensorParallel, device: torch.device) -> DeviceMesh | None:
    """The ranks as a mesh of one axis; None for a single rank."""
    if parallel.size == 1:
        return None
    assert parallel.group is not None
    return DeviceMesh.from_group(parallel.group, device.type)


def global_tensor(
    local: Tensor, spans: Sequence[tuple[Span, ...]], rank: int, mesh: DeviceMesh | None
) -> Tensor:
    """The whole of a tensor, of which this rank holds `local`, padding included.

    spans: by rank, the span of each dim. mesh: as of `mesh_of`. Without one, a view is enough.
    """
    held = spans[rank]
    shape = torch.Size(span.full for span in held)
    if mesh is None:
        return local[tuple(slice(0, span.size) for span in held)]
    placement = _placement(spans)
    if placement is None:
        return PiecedTensor(local, held)
    view = local[tuple(slice(0, span.size) for span in held)]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(view, mesh, [placement], run_check=False, shape=shape, stride=stride)


def _placement(spans: Sequence[tuple[Span, ...]]) -> Placement | None:
    """How DTensor calls these parts; None where it has no word for them."""
    split = [dim for dim, span in enumerate(spans[0]) if any(part[dim] != span for part in spans)]
    if not split:
        return Replicate()
    parts = [part[split[0]] for part in spans]
    per_rank = -(-parts[0].full // len(parts))
    bounds = [min(parts[0].full, rank * per_rank) for rank in range(len(parts) + 1)]
    is_even = len(split) == 1 and all(
        _is_in_order(part) and (part.start, part.stop) == (low, high)
        for part, (low, high) in zip(parts, itertools.pairwise(bounds), strict=True)
    )
    return Shard(split[0]) if is_even else None


def _is_in_order(span: Span) -> bool:
    """Whether rows are stored from the first on, without padding between them or rows twice."""
    return all(piece.start - span.start == piece.offset for piece in span.stored)


class PiecedTensor(Tensor):
    """A tensor of which this rank holds pieces, for `torch.distributed.checkpoint` alone."""

    pieces: list[tuple[torch.Size, Tensor]]  # where each starts in the whole, and a view of it

    @staticmethod
    def __new__(cls, local: Tensor, spans: tuple[Span, ...]) -> PiecedTensor:
        shape = torch.Size(span.full for span in spans)
        made: PiecedTensor = Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device
        )
        made.pieces = []
        for pieces in itertools.product(*(span.stored for span in spans)):
            within = tuple(slice(p.offset, p.offset + p.stop - p.start) for p in pieces)
            view = local[within]
            if view.numel():
                made.pieces.append((torch.Size(p.start for p in pieces), view))
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PiecedTensor({list(self.shape)}, {len(self.pieces)} pieces here)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(
            f"{func} of a tensor that ranks hold in pieces: it is there for "
            "torch.distributed.checkpoint to save and load; take the model's parameters"
        )

    # The three methods by which torch.distributed.checkpoint asks a tensor of a kind unknown to it.

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """A piece once, though this rank may hold it twice; that others do, torch sees itself."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, view.shape),
                    properties=TensorProperties.create_from_tensor(view),
                    size=self.shape,
                ),
            )
            for offsets, view in dict(reversed(self.pieces)).items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, view.shape) for offsets, view in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The piece that starts at an offset; of two, the one that was listed under the number."""
        number = index.index
        if number is not None and number < len(self.pieces):
            offsets, view = self.pieces[number]
            if offsets == index.offset:
                return view
        return next(view for offsets, view in self.pieces if offsets == index.offset)

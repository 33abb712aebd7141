"""The slice of an unembedding that this rank holds, from weights that others have laid out.

A weight [V, d] may be whole, a DTensor that is split over its rows, or a plain slice with its first
id (Megatron's layout). It may be split over several axes of a mesh: FSDP2 splits what tensor
parallelism has split before, which DTensor writes as _StridedShard. Nothing is gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .collectives import gather_over
from .group import TensorParallel
from .spans import Span
from .vocab import Head, VocabSlice

# What a plain slice is named along: it has no mesh.
NO_MESH = ""


def vocab_slice(
    weight: Tensor,
    *,
    parallel: TensorParallel | None = None,
    first_id: int | None = None,
    vocab_size: int | None = None,
) -> tuple[VocabSlice, tuple[str, ...]]:
    """(this rank's slice of an unembedding, the name of each axis that it is split over).

    weight: whole; or a DTensor [V, d] split over its rows; or [n, d], rows of ids from `first_id`
    on, of which the ranks of `parallel` hold the others in the order of ranks. vocab_size: how many
    ids there are, where rows beyond them are padding; needed for a plain slice. Raises ValueError
    for any other layout, naming it.
    """
    if not isinstance(weight, Tensor):
        raise ValueError(f"a head's weight is a tensor [V, d], not {type(weight).__name__}")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"a head's weight is [V, d] in floats, not {list(weight.shape)} in {weight.dtype}"
        )
    if isinstance(weight, DTensor):
        if parallel is not None or first_id is not None:
            raise ValueError("a head that is a DTensor says itself how it is split")
        return _of_dtensor(weight, vocab_size)
    rows = weight.shape[0]
    if parallel is None or parallel.size == 1:
        full = rows if vocab_size is None else vocab_size
        if (first_id or 0) != 0 or rows < full:
            raise ValueError(
                f"a head of {rows} rows from {first_id or 0} on is a slice of {full}: give "
                "parallel, the ranks that hold the others"
            )
        return VocabSlice(weight, _span(0, rows, full)), ()
    if first_id is None or vocab_size is None:
        raise ValueError(
            "a slice of a head needs first_id, the id of its first row, and vocab_size, how many "
            "ids all ranks have"
        )
    return VocabSlice(weight, _span(first_id, rows, vocab_size), (parallel,)), (NO_MESH,)


def check_slices(head: Head) -> None:
    """Raise ValueError, on every rank, unless the ranks' slices are the vocabulary without gaps."""
    bounds = torch.tensor([head.vocab.start, head.vocab.stop, head.vocab.full])
    found = gather_over(bounds.to(head.weight.device), head.axes).tolist()
    stop, full = 0, found[0][2]
    for start, its_stop, its_full in found:
        if start != stop or its_full != full:
            break
        stop = its_stop
    if stop != full:
        slices = ", ".join(f"{start} to {its_stop}" for start, its_stop, _ in found)
        raise ValueError(f"slices of ids {slices}, by rank, are no vocabulary of {full} ids")


def _of_dtensor(weight: DTensor, vocab_size: int | None) -> tuple[VocabSlice, tuple[str, ...]]:
    mesh, order = weight.device_mesh, _axes_by_size(weight)
    start, rows = 0, weight.shape[0]
    for axis in order:
        per_rank = -(-rows // mesh.size(axis))
        before = min(rows, mesh.get_local_rank(axis) * per_rank)
        start, rows = start + before, min(per_rank, rows - before)
    local = weight.to_local()
    if local.shape[0] != rows:
        raise ValueError(
            f"a head laid out as {_shown(weight)} holds {local.shape[0]} rows here, where parts of "
            f"{rows} are expected: such a layout is not read"
        )
    split = [axis for axis in order if mesh.size(axis) > 1]
    axes = tuple(TensorParallel.from_group(mesh.get_group(axis)) for axis in split)
    span = _span(start, rows, weight.shape[0] if vocab_size is None else vocab_size)
    return VocabSlice(local, span, axes), tuple(axis_name(mesh, axis) for axis in split)


def axis_name(mesh: DeviceMesh, axis: int) -> str:
    """The name of an axis, or its number where a mesh has no names."""
    return str(axis) if mesh.mesh_dim_names is None else mesh.mesh_dim_names[axis]


def _axes_by_size(weight: DTensor) -> list[int]:
    """The axes over which rows are split, that of the largest parts first."""
    plain: list[int] = []
    strided: list[int] = []
    for axis, placement in enumerate(weight.placements):
        if isinstance(placement, Replicate):
            continue
        if placement.is_partial() or getattr(placement, "dim", None) != 0:
            raise ValueError(
                f"a head laid out as {_shown(weight)} cannot be read: only rows may be split "
                "(Shard(0)), and whole rows copied (Replicate)"
            )
        # _StridedShard splits the parts of axes that come after it in the mesh
        (plain if type(placement) is Shard else strided).append(axis)
    return [*plain, *strided]


def _span(start: int, rows: int, full: int) -> Span:
    stop = min(start + rows, full)
    return Span(min(start, full), stop, full, rows)


def _shown(weight: DTensor) -> str:
    mesh: DeviceMesh = weight.device_mesh
    sizes = ", ".join(f"{axis_name(mesh, axis)}: {mesh.size(axis)}" for axis in range(mesh.ndim))
    return f"{list(weight.placements)} on a mesh of {sizes}"


def whole_tensor(tensor: Tensor) -> Tensor:
    """A small tensor that may be split, whole on every rank: all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

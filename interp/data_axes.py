"""The mesh axes along which ranks hold other texts, as FSDP2 has split a model over them.

FSDP2 says it by its splits alone: while its parameters are sharded each is a DTensor, on a mesh
whose first split axis is FSDP2's own, those of tensor parallelism coming after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from ..model.arguments import all_of
from ..parallel.group import Axes, TensorParallel
from ..parallel.layouts import axis_name


def data_axes_of(
    model: nn.Module | None, given: Sequence[str] | None
) -> Callable[[Tensor], tuple[str, ...]]:
    """A function of a head's weight that gives the names of its data axes, as it is at the time.

    Raises ValueError where the parameters of a model under FSDP2 do not say it, at this moment.
    """
    if given is not None:
        names = tuple(all_of(given, str, "data_axes", "names of mesh axes"))
        return lambda weight: names
    if model is None or not _is_under_fsdp(model):
        return lambda weight: ()
    mesh, index = _fsdp_axis(model)
    name = axis_name(mesh, index)

    def data_axes(weight: Tensor) -> tuple[str, ...]:
        # while a pass runs, the head may be whole along this axis
        is_split = isinstance(weight, DTensor) and weight.device_mesh == mesh
        return (name,) if is_split else ()

    return data_axes


def data_ranks_of(model: nn.Module) -> Axes:
    """The axes along which ranks hold other texts: of FSDP2, HSDP, or DistributedDataParallel."""
    for each in model.modules():  # it may be wrapped itself, as by torch.compile
        if isinstance(each, DistributedDataParallel):
            return (TensorParallel.from_group(each.process_group),)
    if not _is_under_fsdp(model):
        return ()
    mesh, index = _fsdp_axis(model)
    # axes before FSDP2's own hold copies of what it splits
    return tuple(TensorParallel.from_group(mesh.get_group(axis)) for axis in range(index + 1))


def _is_under_fsdp(model: nn.Module) -> bool:
    return any(isinstance(each, FSDPModule) for each in model.modules())


def _fsdp_axis(model: nn.Module) -> tuple[DeviceMesh, int]:
    parameters = list(model.parameters())
    split = [each for each in parameters if isinstance(each, DTensor)]
    widest = max(split, key=lambda each: each.device_mesh.ndim, default=None)
    if widest is None or (widest.device_mesh.ndim == 1 and len(split) < len(parameters)):
        raise ValueError(
            "FSDP2 has gathered parameters of this model at the moment, so that its axis is not to "
            "be seen: call model.reshard() first, or name data_axes"
        )
    axes = (
        index
        for index, placement in enumerate(widest.placements)
        if not isinstance(placement, Replicate)
    )
    return widest.device_mesh, next(axes, 0)

"""A model on any number of ranks as a state dict of global shapes, under transformers' names."""

from __future__ import annotations

from torch import Tensor

from ..parallel.global_tensors import global_tensor, mesh_of
from .sharding import EMBED, HEAD, rank_spans, tensor_table
from .transformer import Transformer


def sharded_state_dict(model: Transformer) -> dict[str, Tensor]:
    """Views of this rank's parameters, each with the shape of the whole tensor.

    `torch.distributed.checkpoint.save` of it writes a checkpoint that transformers' models read
    under any sharding, and `load` fills the model in place from such a one, on any number of ranks.
    Equal slices are DTensors; pieces that those cannot describe are good for saving and loading
    alone. A tied head is there under both of its names, as in `state_dict()` of transformers.
    """
    parallel, config = model.parallel, model.config
    mesh = mesh_of(parallel, model.device)
    ranks = [rank_spans(config, rank, parallel.size) for rank in range(parallel.size)]
    parameters = dict(model.named_parameters())
    states: dict[str, Tensor] = {}
    for name, parts in tensor_table(config).items():
        parameter, first_row = parameters[name].detach(), 0
        for tensor in parts:
            n_rows = tensor.spans(model.spans)[0].padded
            local = parameter[first_row : first_row + n_rows]
            spans = [tensor.spans(named) for named in ranks]
            states[tensor.name] = global_tensor(local, spans, parallel.rank, mesh)
            first_row += n_rows
    if config.tied_head:
        (embed,), (head,) = EMBED["embed.weight"], HEAD["head.weight"]
        states[head.name] = states[embed.name]
    return states

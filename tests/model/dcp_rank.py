"""One rank of four of `test_dcp_ranks.py`: python dcp_rank.py RANK SIZE STORE FOLDER NAME...

For each model of `tests/oracles.py` that is named: FSDP2 over transformers' model on all ranks is
saved and read here on 1, 2 and 3 of them; ours is saved on 2 and 3, and loaded by itself and by
FSDP2. Prints a JSON line per step: the largest difference of logits to transformers in one
process, relative to the largest logit, and the same before anything was loaded.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))

from oracles import hf_model

from shardlens.model import ModelFiles, Transformer, load_weights, sharded_state_dict
from shardlens.parallel import TensorParallel

IDS = torch.arange(11)[None] * 37 % 509


def made(name: str) -> Any:
    torch.manual_seed(0)
    return hf_model(name)


def sharded(name: str) -> Any:
    model = made(name)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def halve(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


@torch.no_grad()
def error(name: str, model: Any) -> float:
    """How far this rank's logits are from those of transformers in one process."""
    truth = made(name)(IDS).logits
    if isinstance(model, Transformer):
        vocab = model.head.vocab
        logits = model.norm(model(IDS)) @ model.head.valid_weight.T
        truth = truth[..., vocab.start : vocab.stop]
    else:
        logits = model(IDS).logits
    return float((logits - truth).abs().max() / truth.abs().max())


def save(name: str, folder: Path) -> dict[str, Any]:
    model = sharded(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(IDS).logits.sum().backward()
    optimizer.step()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"], "step": 1}
    dcp.save(states, checkpoint_id=folder)
    return {"error": error(name, model)}


def load(name: str, folder: Path) -> dict[str, Any]:
    model = sharded(name)
    halve(model)
    before, states = error(name, model), model.state_dict()
    dcp.load(states, checkpoint_id=folder)
    model.load_state_dict(states)
    return {"error": error(name, model), "before": before}


def read(name: str, folder: Path, parallel: TensorParallel) -> Transformer:
    files = ModelFiles(folder)
    model = Transformer(files.config, parallel=parallel)
    load_weights(model, files.weights())
    return model


def ours(name: str, source: Path, folder: Path, parallel: TensorParallel) -> dict[str, Any]:
    """Save a model, change it, load it again in place."""
    model = read(name, source, parallel)
    dcp.save(sharded_state_dict(model), checkpoint_id=folder, process_group=parallel.group)
    whole = {key: value.clone() for key, value in model.named_parameters()}
    halve(model)
    before = error(name, model)
    states = sharded_state_dict(model)
    dcp.load(states, checkpoint_id=folder, process_group=parallel.group)
    same = all(torch.equal(value, whole[key]) for key, value in model.named_parameters())
    kinds = sorted({type(state).__name__ for state in states.values()})
    return {"error": error(name, model), "before": before, "same": same, "kinds": kinds}


def steps(name: str, folder: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    theirs, rank = folder / "theirs", dist.get_rank()
    yield "saved by FSDP2", save(name, theirs)
    if rank == 0:
        made(name).config.save_pretrained(theirs)
    dist.barrier()
    for size in (1, 2, 3):
        few = dist.new_group(list(range(size)))
        parallel = TensorParallel.from_group(few) if rank < size else None
        found = None if parallel is None else {"error": error(name, read(name, theirs, parallel))}
        yield f"read on {size}", found
        if size > 1:
            mine = folder / f"ours-{size}"
            yield (
                f"ours on {size}",
                None if parallel is None else ours(name, theirs, mine, parallel),
            )
            dist.barrier()
            yield f"FSDP2 from ours on {size}", load(name, mine)
            if rank == 0:
                shutil.copy(theirs / "config.json", mine)
            dist.barrier()
            again = error(name, read(name, mine, TensorParallel.single()))
            yield f"read from ours on {size}", {"error": again}


def main() -> None:
    rank, size, store, folder, *names = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size)
    )
    torch.set_num_threads(1)
    for name in names:
        for step, found in steps(name, Path(folder) / name):
            if found is not None:
                print(json.dumps({"model": name, "step": step, "rank": int(rank), **found}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

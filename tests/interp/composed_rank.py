"""One rank of `test_composed.py`: python composed_rank.py RANK SIZE STORE

The model of examples/train_fsdp2.py, over FSDP2 x tensor parallelism, with every block checkpointed
and compiled, trained for 20 steps of 2 micro-batches with a monitor and without. Prints one JSON
line: whether this rank's weights are equal bit for bit, the metrics, and graphs compiled by then.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from train_fsdp2 import split_model, walks

from shardlens.interp import LayerMetrics, LensMonitor

STEPS, EVERY = 20, 5


def train(mesh: DeviceMesh, watched: bool) -> tuple[list[Tensor], list[LayerMetrics], list[int]]:
    torch._dynamo.reset()
    counters.clear()
    model = split_model(mesh).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.model.layers:
        block.compile(backend="eager")  # AOTAutograd fails on DeviceMeshes (torch 2.13)
    found: list[LayerMetrics] = []
    monitor = LensMonitor(model, every=EVERY, positions=32, to=found.append)
    rule = torch.optim.AdamW(model.parameters(), lr=2e-3)
    graph = torch.randint(512, (512, 4), generator=torch.Generator().manual_seed(1))
    texts = torch.Generator().manual_seed(2 + mesh.get_local_rank("dp"))
    compiled = []
    for step in range(STEPS):
        for _ in range(2):
            tokens = walks(2, 17, graph, texts)
            ids, labels = tokens[:, :-1], tokens[:, 1:]
            with monitor.at(step if watched else 1, labels):
                logits = model(ids, use_cache=False).logits
            with loss_parallel():
                F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        rule.step()
        rule.zero_grad()
        compiled.append(counters["stats"]["unique_graphs"])
    weights = [
        (each.to_local() if isinstance(each, DTensor) else each).detach().clone()
        for each in model.parameters()
    ]
    return weights, found, compiled


def main() -> None:
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    plain, _, plain_graphs = train(mesh, watched=False)
    weights, metrics, graphs = train(mesh, watched=True)
    found = {
        "same": all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True)),
        "steps": [each.step for each in metrics],
        "losses": [each.loss[-1] for each in metrics],
        "plain_graphs": plain_graphs,
        "graphs": graphs,
    }
    print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

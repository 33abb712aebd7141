"""One rank of `test_replicated.py`: python replicated_rank.py RANK SIZE STORE

A model under DistributedDataParallel, as it is and inside torch.compile, is monitored on ranks with
other texts. Prints one JSON line: the metrics of both, and of all texts by one process.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from others import IDS, llama
from torch.nn.parallel import DistributedDataParallel

from shardlens.interp import LayerMetrics, LensMonitor


def main() -> None:
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    targets = IDS.roll(-1, 1)
    wrapped = DistributedDataParallel(llama())
    compiled = torch.compile(DistributedDataParallel(llama()), backend="eager")
    models = {"replicated": wrapped, "compiled": compiled, "alone": llama()}
    found: dict[str, list[LayerMetrics]] = {name: [] for name in models}
    for name, model in models.items():
        monitor = LensMonitor(model, every=1, to=found[name].append)
        rows = slice(None) if name == "alone" else slice(rank, rank + 1)
        with torch.no_grad(), monitor.at(0, targets[rows]):
            model(IDS[rows])
    metrics = {name: [each.to_dict() for each in seen] for name, seen in found.items()}
    print(json.dumps(metrics), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""A LLaMA of transformers trained under FSDP2 x tensor parallelism, with every layer read.

    torchrun --nproc-per-node 4 examples/train_fsdp2.py --out lens.jsonl

Needs transformers, which the extra "dev" brings. Half of the ranks, or those that --tensor-parallel
leaves, hold other texts; on a CPU they talk gloo, on CUDA NCCL. A text is a walk over a graph in
which a token has four successors, so that the loss falls from ln 512 = 6.2 towards ln 4 = 1.4 nats.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

from shardlens.interp import LensMonitor

VOCAB, SUCCESSORS = 512, 4


def split_model(mesh: DeviceMesh) -> LlamaForCausalLM:
    """The same weights on any number of ranks, split by heads and ids, then over texts."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    ).to(mesh.device_type)
    by_columns, by_rows = ColwiseParallel(), RowwiseParallel()
    plan = {"lm_head": ColwiseParallel(use_local_output=False)}
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        plan[f"model.layers.*.{part}"] = by_columns
    for part in ("mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{part}"] = by_columns
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{part}"] = by_rows
    parallelize_module(model, mesh["tp"], plan)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh["dp"])
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo takes no other
    return model


def walks(batch: int, length: int, graph: Tensor, generator: torch.Generator) -> Tensor:
    """Texts [B, T] in which each token is a successor of the one before it."""
    choices = torch.randint(SUCCESSORS, (batch, length), generator=generator)
    tokens = [torch.randint(VOCAB, (batch,), generator=generator)]
    for step in range(1, length):
        tokens.append(graph[tokens[-1], choices[:, step]])
    return torch.stack(tokens, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lens.jsonl"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--tensor-parallel", type=int, default=2, metavar="RANKS")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    sizes = (dist.get_world_size() // args.tensor_parallel, args.tensor_parallel)
    mesh = init_device_mesh(device, sizes, mesh_dim_names=("dp", "tp"))
    model = split_model(mesh)
    monitor = LensMonitor(model, every=args.every, to=args.out)
    rule = torch.optim.AdamW(model.parameters(), lr=2e-3)
    graph = torch.randint(VOCAB, (VOCAB, SUCCESSORS), generator=torch.Generator().manual_seed(1))
    texts = torch.Generator().manual_seed(2 + mesh.get_local_rank("dp"))
    start = time.perf_counter()
    for step in range(args.steps):
        tokens = walks(8, 65, graph, texts).to(device)
        ids, labels = tokens[:, :-1], tokens[:, 1:]
        with monitor.at(step, labels):
            logits = model(ids, use_cache=False).logits
        with loss_parallel():  # nobody gathers the logits, for the lens as for the loss
            F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        rule.step()
        rule.zero_grad()
        if step % args.every == 0 and dist.get_rank() == 0:
            found = json.loads(args.out.read_text().splitlines()[-1])
            by_layer = " ".join(f"{loss:6.3f}" for loss in found["loss"])
            spent = time.perf_counter() - start
            print(f"step {step:4}  {spent:4.0f} s  loss after each block {by_layer}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""One rank of `test_unembedding.py`: python unembedding_rank.py RANK SIZE STORE

Lays the head of one small transformers model out in many ways and compares what `Unembedding` reads
with full float64 logits. Prints one JSON line per layout: the largest error in nats, whether ids
and ranks of targets are equal, and the rows of the head; or the refusal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from shardlens.interp import Unembedding
from shardlens.parallel import TensorParallel

V, D, K = 97, 32, 7
IDS = (0, 50, V - 1)


def plain() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 1.5)
    return model


def split_by_fsdp(mesh: DeviceMesh, model: LlamaForCausalLM | None = None) -> LlamaForCausalLM:
    model = plain() if model is None else model
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def split_by_head(mesh: DeviceMesh) -> LlamaForCausalLM:
    return parallelize_module(plain(), mesh, {"lm_head": ColwiseParallel()})


def split_by_their_plan(store: str) -> LlamaForCausalLM:
    folder = f"{store}-model"
    if dist.get_rank() == 0:
        plain().save_pretrained(folder)
    dist.barrier()
    return LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)


Case = tuple[str, Callable[[], Unembedding], Tensor]


def states(seed: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def cases(rank: int, size: int, store: str) -> Iterator[Case]:
    """Names, unembeddings, and this rank's states."""
    same, mine = states(1), states(2 + rank, rows=3 + rank)
    dp, tp = (init_device_mesh("cpu", (size,), mesh_dim_names=(name,)) for name in ("dp", "tp"))
    yield "plain", lambda: Unembedding.of(plain()), mine
    yield "FSDP2", lambda: Unembedding.of(split_by_fsdp(dp)), mine
    yield "FSDP2, an idle rank", lambda: Unembedding.of(split_by_fsdp(dp)), mine[: 3 * rank]

    def after_a_pass() -> Unembedding:
        model = split_by_fsdp(dp)
        made = Unembedding.of(model)
        model(torch.arange(5)[None])
        return made

    yield "FSDP2 after a pass", after_a_pass, mine
    yield "head split", lambda: Unembedding.of(split_by_head(tp)), same
    yield "head split, other states", lambda: Unembedding.of(split_by_head(tp)), mine[:3]
    yield "transformers' plan", lambda: Unembedding.of(split_by_their_plan(store)), same
    yield "slices", lambda: megatron(rank, size, 0), same
    yield "slices with a gap", lambda: megatron(rank, size, 1), same
    if size < 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    of_pair = states(20 + rank // 2, rows=3 + rank // 2)
    both = lambda: split_by_fsdp(mesh["dp"], split_by_head(mesh["tp"]))  # noqa: E731
    yield "FSDP2 x head split", lambda: Unembedding.of(both()), of_pair
    yield "HSDP", lambda: Unembedding.of(split_by_fsdp(mesh)), mine
    for placements in ((Replicate(), Shard(0)), (Shard(0), Replicate()), (Shard(0), Shard(0))):
        yield f"bare {placements}", lambda p=placements: bare(mesh, p), same
    yield "bare, data axis", lambda: bare(mesh, (Shard(0), Shard(0)), data_axes=["dp"]), of_pair
    yield "bare, wrong dim", lambda: bare(mesh, (Replicate(), Shard(1))), same
    yield "bare, sums", lambda: bare(mesh, (Replicate(), Partial())), same


def bare(mesh: DeviceMesh, placements: tuple[Any, ...], **options: Any) -> Unembedding:
    model = plain()
    head = distribute_tensor(model.lm_head.weight.detach(), mesh, placements)
    return Unembedding.of((model.model.norm.weight, 1e-6, head), **options)


def megatron(rank: int, size: int, gap: int) -> Unembedding:
    """Equal slices of a vocabulary that is padded with rows which would win."""
    model, per_rank = plain(), -(-V // size)
    padding = torch.full((per_rank * size - V, D), 9.0)
    whole = torch.cat((model.lm_head.weight.detach(), padding))
    return Unembedding.of(
        (model.model.norm.weight, 1e-6, whole[rank * per_rank :][:per_rank]),
        parallel=TensorParallel.from_group(),
        first_id=rank * per_rank + gap,
        vocab_size=V,
    )


def compare(made: Unembedding, rows: Tensor) -> dict[str, Any]:
    model = plain().double()
    truth = model.lm_head(model.model.norm(rows.double())).log_softmax(-1)
    targets = torch.arange(len(rows)) * 13 % V
    read = made.read(rows, top_k=K, targets=targets)
    at_targets = truth.gather(1, targets[:, None])
    best = truth.topk(K, -1)
    errors = [
        read.logprobs - best.values,
        read.target_logprob - at_targets[:, 0],
        read.entropy + (truth * truth.exp()).sum(-1),
        made.head_rows(IDS) - model.lm_head.weight[list(IDS)],
        made.head_row(IDS[1]) - model.lm_head.weight[IDS[1]],
    ]
    return {
        "error": max(float(each.abs().max()) for each in errors if each.numel()),
        "ids": torch.equal(read.token_ids, best.indices),
        "ranks": torch.equal(read.target_rank, (truth > at_targets).sum(-1)),
    }


def main() -> None:
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    for name, make, rows in cases(rank, size, store):
        try:
            with torch.no_grad():
                found = compare(make(), rows)
        except ValueError as error:
            found = {"refusal": str(error)}
        print(json.dumps({"case": name, "rank": rank, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

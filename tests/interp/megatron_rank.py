"""One rank of `test_megatron.py`: python megatron_rank.py RANK SIZE STORE

Megatron's output layer, made by Megatron's code on gloo, is read by its slice, its ranks and the id
of its first row, and compared with full float64 logits. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.utils import VocabUtility

from shardlens.interp import Unembedding
from shardlens.parallel import TensorParallel, vocab_parallel_cross_entropy, vocab_slice

V, PADDED, D = 509, 512, 48


def main() -> None:
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    config = ModelParallelConfig(
        tensor_model_parallel_size=size, use_cpu_initialization=True, params_dtype=torch.float32
    )
    layer = tensor_parallel.ColumnParallelLinear(
        D,
        PADDED,
        config=config,
        init_method=lambda weight: torch.nn.init.normal_(
            weight, generator=torch.Generator().manual_seed(0)
        ),
        bias=False,
    )
    first, _ = VocabUtility.vocab_range_from_global_vocab_size(PADDED, rank, size)
    ranks = TensorParallel.from_group(parallel_state.get_tensor_model_parallel_group())
    slices = [torch.empty_like(layer.weight) for _ in range(size)]
    dist.all_gather(slices, layer.weight.detach())
    whole = torch.cat(slices)[:V].double()
    generator = torch.Generator().manual_seed(1)
    norm_weight, states = (
        torch.rand(D, generator=generator) + 0.5,
        torch.randn(9, D, generator=generator),
    )
    normed = states * (states.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm_weight
    truth = (normed.double() @ whole.T).log_softmax(-1)
    targets = torch.arange(9) * 56 % V
    made = Unembedding.of(
        (norm_weight, 1e-5, layer.weight), parallel=ranks, first_id=first, vocab_size=V
    )
    read = made.read(states, top_k=5, targets=targets)
    best, at_targets = truth.topk(5, -1), truth.gather(1, targets[:, None])
    head, _ = vocab_slice(layer.weight, parallel=ranks, first_id=first, vocab_size=V)
    loss = vocab_parallel_cross_entropy(normed, head, targets)
    loss.backward()
    gradient = (truth.exp() - torch.eye(V, dtype=torch.float64)[targets]).T @ normed.double() / 9
    stop = min(first + len(layer.weight), V)
    errors = [
        read.logprobs - best.values,
        read.target_logprob - at_targets[:, 0],
        made.head_row(V - 1) - whole[V - 1],
        loss.detach() + at_targets.mean(),
        layer.weight.grad[: stop - first] - gradient[first:stop],
        layer.weight.grad[stop - first :],
    ]
    found = {
        "error": max(float(each.abs().max()) for each in errors if each.numel()),
        "ids": torch.equal(read.token_ids, best.indices),
        "ranks": torch.equal(read.target_rank, (truth > at_targets).sum(-1)),
    }
    print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

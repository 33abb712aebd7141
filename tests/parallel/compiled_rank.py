"""One rank of `test_compiled_ranks.py`: python compiled_rank.py RANK SIZE STORE CASE...

Each case is compiled as one graph and compared with itself run eagerly, forward and backward, then
forward alone. Prints one JSON line per case. Ranks are processes: dynamo knows no ranks as threads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from shardlens.model import ForwardPass, ModelConfig, Transformer, causal_attention, init_weights
from shardlens.parallel import (
    ColumnLinear,
    RowLinear,
    TensorParallel,
    VocabEmbedding,
    collectives,
    split_even,
    split_vocab,
    vocab_parallel_cross_entropy,
)

CONFIG = ModelConfig.from_hf(
    dict(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=509,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
)
VOCAB, D, MID, T = 31, 12, 23, 9


@dataclass(frozen=True)
class Case:
    """A function to compile, its inputs, and the parameters to take gradients to."""

    run: Callable[..., Any]
    inputs: list[Tensor]
    parameters: list[nn.Parameter]


def layers(parallel: TensorParallel) -> Case:
    """Embedding, column and row, whose inputs need both sums of gradients."""
    rank, size = parallel.rank, parallel.size
    mid = split_even(MID, rank, size).size
    embed = VocabEmbedding(split_vocab(VOCAB, rank, size), D, parallel=parallel)
    column = ColumnLinear(D, mid, bias=True, parallel=parallel)
    row = RowLinear(mid, D, bias=True, parallel=parallel)
    parts = nn.ModuleList([embed, column, row])
    for parameter in parts.parameters():
        nn.init.normal_(parameter)

    def run(ids: Tensor, x: Tensor) -> Tensor:
        return x + row(F.silu(column(embed(ids) + x)))

    x = torch.randn(2, T, D, requires_grad=True)
    return Case(run, [torch.randint(0, VOCAB, (2, T)), x], list(parts.parameters()))


def block(parallel: TensorParallel) -> Case:
    model = new_model(parallel)
    part = model.blocks[1]
    run = ForwardPass(causal_attention(model.rope(torch.arange(T)[None])))
    states = [torch.randn(2, T, CONFIG.d, requires_grad=True) for _ in range(2)]
    return Case(lambda x, delta: part(x, delta, 1, run), states, list(part.parameters()))


def training_loss(parallel: TensorParallel) -> Case:
    """The whole model and its loss."""
    model = new_model(parallel)

    def run(ids: Tensor, targets: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(model.norm(model(ids)), model.head, targets)

    ids = torch.randint(0, CONFIG.vocab_size, (2, T + 1))
    return Case(run, [ids[:, :-1], ids[:, 1:]], list(model.parameters()))


def new_model(parallel: TensorParallel) -> Transformer:
    model = Transformer(CONFIG, parallel=parallel)
    init_weights(model, std=0.2)
    return model


CASES = {"layers": layers, "block": block, "training_loss": training_loss}


def results(run: Callable[..., Any], case: Case) -> list[Tensor]:
    """Outputs, then gradients."""
    out = run(*case.inputs)
    out = out if isinstance(out, tuple) else (out,)
    leaves = [*case.parameters, *(x for x in case.inputs if x.requires_grad)]
    gradients = torch.autograd.grad(sum(part.sin().sum() for part in out), leaves)
    return [part.detach() for part in (*out, *gradients)]


def error(ours: list[Tensor], truth: list[Tensor]) -> float:
    """The largest, relative to the largest entry of its tensor."""
    pairs = zip(ours, truth, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@contextmanager
def without_exchange() -> Iterator[None]:
    """Every rank keeps its partial sums."""
    exchange = collectives.all_reduce
    collectives.all_reduce = lambda x, parallel: x
    try:
        yield
    finally:
        collectives.all_reduce = exchange


def compare(case: Case) -> dict[str, Any]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.run, fullgraph=True, backend=counter)
    eager = results(case.run, case)
    found = error(results(compiled, case), eager)
    graphs = counter.frame_count
    with torch.no_grad():
        out = compiled(*case.inputs)
    found = max(found, error([out[0] if isinstance(out, tuple) else out], eager[:1]))
    with without_exchange():
        alone = error(results(case.run, case), eager)
    return {"graphs": graphs, "error": found, "error_without_exchange": alone}


def main(rank: int, size: int, store: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parallel = TensorParallel.single()
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        parallel = TensorParallel.from_group()
    for name in names:
        print(json.dumps({"case": name, **compare(CASES[name](parallel))}), flush=True)
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])

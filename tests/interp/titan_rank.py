"""One rank of `test_titan.py`: python titan_rank.py RANK SIZE STORE TP SEQUENCE_PARALLEL

torchtitan's Llama, split by torchtitan's own code over FSDP2 x tensor parallelism, is read, steered
and monitored, and compared with the same weights in one piece. Prints one JSON line per finding.
Its attention kernel, which has no backward pass on CPUs, is replaced by PyTorch's.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchtitan.distributed.parallel_dims as dims_module
from others import hooks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.llama3 import llama3_configs, parallelize_llama
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

from shardlens import Steering
from shardlens.interp import LayerMetrics, LensMonitor, Unembedding, steered, watch
from shardlens.model import POINTS

TOKENS, VOCAB = 128, 2048
MASKS: dict[str, Any] = {}  # asked for by the model, though the kernel here does without
EDITS = (
    Steering(torch.linspace(-1, 1, 256), [1], scale=0.5, positions=[3, 100]),
    Steering(torch.linspace(1, -1, 256), [2, 4], "mlp_norm", scale=0.5, positions=64),
)


def causal(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Any:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)
    return out, None


def parallelism(tp: int, sequence: bool, size: int) -> ParallelismConfig:
    return ParallelismConfig(
        tensor_parallel_degree=tp,
        data_parallel_shard_degree=size // tp,
        enable_sequence_parallel=sequence,
        spmd_backend="partial_dtensor",
    )


def config(sequence: bool) -> Any:
    found = llama3_configs["debugmodel"](attn_backend="flex")
    set_llama3_sharding_config(found, enable_sp=sequence)
    return found


def split_model(
    dims: ParallelDims, tp: int, sequence: bool, size: int, *, busy: bool = False
) -> nn.Module:
    """busy: with activation checkpointing, and every block compiled.

    Under tensor parallelism nothing is: AOTAutograd fails on a DeviceMesh that torchtitan's
    partial_dtensor saves for the backward pass, with or without a monitor (torch 2.13).
    """
    with torch.device("meta"):
        model = config(sequence).build()
    model = parallelize_llama(
        model,
        parallel_dims=dims,
        training=TrainingConfig(mixed_precision_param="float32"),
        parallelism=parallelism(tp, sequence, size),
        compile_config=CompileConfig(
            enable=busy and tp == 1, components=["model"], backend="aot_eager"
        ),
        ac_config=FullAC.Config() if busy else None,
        dump_folder="",
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_states(buffer_device=torch.device("cpu"))
        for name, parameter in model.named_parameters():
            fill(parameter, name)
    return model


def fill(parameter: nn.Parameter, name: str) -> None:
    """The same weights whatever the layout and the wrappers."""
    plain = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
    generator = torch.Generator().manual_seed(sum(map(ord, plain)))
    whole = 0.05 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    assert isinstance(parameter, DTensor)
    parts = distribute_tensor(
        whole, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    parameter.to_local().copy_(parts.to_local())


def tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, ids: Tensor) -> Tensor:
    positions = torch.arange(TOKENS)[None].expand(2, -1)
    if "causal" not in MASKS:
        MASKS["causal"] = model.get_attention_masks(positions)
    logits = model(ids, positions=positions, attention_masks=MASKS["causal"])
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def whole_copy(model: nn.Module, sequence: bool) -> nn.Module:
    made = config(sequence).build()
    made.init_states(buffer_device=torch.device("cpu"))
    weights = {
        name: each.full_tensor() if isinstance(each, DTensor) else each
        for name, each in model.state_dict().items()
    }
    made.load_state_dict(weights)
    return made


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


def say(rank: int, name: str, **found: Any) -> None:
    print(json.dumps({"case": name, "rank": rank, **found}), flush=True)


def main() -> None:
    rank, size, store, tp, sequence = (
        *map(int, sys.argv[1:3]),
        sys.argv[3],
        *map(int, sys.argv[4:6]),
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dims_module.device_type = "cpu"
    FlexAttention._compiled_flex_attn = staticmethod(causal)
    dims = ParallelDims.from_config(parallelism(tp, bool(sequence), size), size)
    dims.build_mesh()
    model = split_model(dims, tp, bool(sequence), size)
    whole = whole_copy(model, bool(sequence))
    unembedding = Unembedding.of(model)
    ids = tokens(rank // tp)  # other texts on the ranks of FSDP2
    with torch.no_grad():
        with watch(model, points=POINTS) as watching:
            logits = run(model, ids)
        with watch(whole, points=POINTS) as expected:
            expected_logits = run(whole, ids)
        say(rank, "states", error=error(watching.stacked(), expected.stacked()))
        say(rank, "logits", error=error(logits, expected_logits))
        model.reshard()
        read = unembedding.read(watching.stacked()[:, ::9, -1], top_k=5)
        best = expected_logits[:, ::9].double().log_softmax(-1).topk(5, -1)
        say(
            rank,
            "lens",
            error=error(read.logprobs, best.values),
            ids=bool((read.token_ids == best.indices).all()),
        )
        row = unembedding.head_row(VOCAB - 1)
        say(rank, "head_row", error=error(row, whole.lm_head.weight[VOCAB - 1]))
        with steered(model, EDITS):
            edited = run(model, ids)
        with steered(whole, EDITS):
            expected_edited = run(whole, ids)
        say(
            rank,
            "steered",
            error=error(edited, expected_edited),
            effect=error(edited, logits),
            untouched=error(edited[:, :3], logits[:, :3]),
        )
    fresh = split_model(dims, tp, bool(sequence), size)
    say(rank, "hooks", left=hooks(model) - hooks(fresh))
    trained = [train(dims, tp, bool(sequence), size, rank, watched) for watched in (False, True)]
    same = all(torch.equal(a, b) for a, b in zip(*(each[0] for each in trained), strict=True))
    found = trained[1][1]
    say(rank, "monitor", same=same, metrics=[each.to_dict() for each in found])
    say(rank, "stage", metrics=[each.to_dict() for each in watch_a_stage(whole, ids)])
    dist.barrier()
    dist.destroy_process_group()


def watch_a_stage(whole: nn.Module, ids: Tensor) -> list[LayerMetrics]:
    """Blocks 0 to 2 as a pipeline's first stage, alone and with the last stage's unembedding."""
    stage = config(sequence=False).build()
    stage.init_states(buffer_device=torch.device("cpu"))
    for number in list(stage.layers):
        if int(number) > 2:
            del stage.layers[number]
    stage.norm = stage.lm_head = None
    found: list[LayerMetrics] = []
    for unembedding in (None, Unembedding.of(whole)):
        monitor = LensMonitor(stage, every=1, to=found.append, unembedding=unembedding)
        with torch.no_grad(), monitor.at(0, ids.roll(-1, 1)):
            run(stage, ids)
    return found


def train(
    dims: ParallelDims, tp: int, sequence: bool, size: int, rank: int, watched: bool
) -> tuple[list[Tensor], list[LayerMetrics]]:
    """20 steps of 2 micro-batches, checkpointed and compiled: weights of this rank, and metrics."""
    torch._dynamo.reset()
    model = split_model(dims, tp, sequence, size, busy=True)
    found: list[LayerMetrics] = []
    monitor = LensMonitor(model, every=10, positions=64, to=found.append)
    rule = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        for micro in range(2):
            ids = tokens(100 + 8 * step + 2 * (rank // tp) + micro)
            labels = ids.roll(-1, 1)
            looked_at = monitor.at(step, labels) if watched else monitor.at(1)
            with looked_at:
                logits = run(model, ids)
            F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        rule.step()
        rule.zero_grad()
    return [each.to_local().detach().clone() for each in model.parameters()], found


if __name__ == "__main__":
    main()

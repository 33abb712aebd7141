"""Kernels compiled ahead of time for GPUs that need not be there; blocks under torch.compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import SMALL
from tolerances import GRADIENT_RELATIVE
from torch import Tensor

from shardlens.bench.compiled import CHIPS
from shardlens.kernels import rope_angles_reference
from shardlens.kernels.head_cut import configs_of
from shardlens.model import (
    ForwardPass,
    ModelConfig,
    Transformer,
    causal_attention,
    init_weights,
    inverse_frequencies,
)

# What the head's product of many rows must use.
INSTRUCTIONS = {
    80: {"HMMA"},
    86: {"HMMA"},
    89: {"HMMA"},
    90: {"HGMMA", "UTMALDG"},
    100: {"UTCHMMA", "UTMALDG"},
    120: {"HMMA"},
}


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """One process for each GPU, side by side; outside the interpreter, which compiles nothing."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "shardlens.bench.compiled", "--capability"]
    started = {
        capability: subprocess.Popen(
            [*command, str(capability)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for capability in INSTRUCTIONS
    }
    try:
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def shipped(capability: int) -> set[str]:
    """The configurations of the head that this chip may be given, as the kernel's options."""
    chip = CHIPS[capability]
    return {
        f"BR={rows} BV={ids} BD={columns} BULK={bulk} num_warps={c.warps} num_stages={c.stages}"
        for n_rows in (1, 32, 64, 128, 129)
        for dtype in (torch.bfloat16, torch.float32)
        for has_bulk in {False, chip.has_wide_products}
        for c in configs_of(n_rows, dtype, chip, has_bulk)
        for rows, ids, columns, _, bulk in [c.tile]
    }


@pytest.mark.slow
@pytest.mark.parametrize("capability", INSTRUCTIONS)
def test_every_kernel_compiles_and_fits(
    capability: int, compilers: dict[int, subprocess.Popen[str]]
) -> None:
    """No shipped configuration spills, exceeds the chip's shared memory, or rounds roughly."""
    stdout, stderr = compilers[capability].communicate()
    assert compilers[capability].returncode == 0, stderr
    *table, last = stdout.splitlines()
    print("\n".join(table))
    built = json.loads(last)["kernels"]
    names = {kernel["kernel"] for kernel in built}
    assert len(names) >= 11 and {"head_kernel", "_target_kernel"} <= names
    assert not [k for k in built if k["spills"]]
    assert not [k for k in built if k["shared_bytes"] > k["shared_limit_bytes"]]
    assert not [k for k in built if k["approximations"]]
    heads = [k for k in built if k["kernel"] == "head_kernel"]
    options = [dict(word.split("=") for word in k["options"].split()) for k in heads]
    wanted = ("BR", "BV", "BD", "BULK", "num_warps", "num_stages")
    assert shipped(capability) <= {" ".join(f"{n}={o[n]}" for n in wanted) for o in options}
    for kernel, given in zip(heads, options, strict=True):  # what fits is decided by an estimate
        size = 4 if kernel["case"] == "head_float32" else 2
        rows, ids, columns, stages = (int(given[n]) for n in ("BR", "BV", "BD", "num_stages"))
        assert kernel["shared_bytes"] <= (rows + ids) * columns * size * stages + 1024
    many = [k for k in heads if k["case"] == "head_many"]
    assert many and all(INSTRUCTIONS[capability] <= k["instructions"].keys() for k in many)


@pytest.mark.slow
def test_a_compiled_block_equals_the_eager_one(device: torch.device, either: str) -> None:
    """torch.compile(fullgraph=True) of a whole block, forward and backward."""
    config = ModelConfig.from_hf({**SMALL, "architectures": ["Qwen3ForCausalLM"], "head_dim": 16})
    model = Transformer(config).to(device)
    init_weights(model, std=0.2)
    block = model.blocks[1]
    positions = torch.arange(9, device=device)[None]
    inv_freq = inverse_frequencies(model.config).to(device)
    rope = rope_angles_reference(positions, inv_freq, torch.float32)

    forward_pass = ForwardPass(causal_attention(rope))

    def run(x: Tensor, delta: Tensor) -> Any:
        return block(x, delta, 1, forward_pass)

    def gradients(function: Any) -> list[Tensor]:
        torch.manual_seed(3)
        x, delta = (torch.randn(2, 9, config.d, device=device).requires_grad_() for _ in range(2))
        out = function(x, delta)
        wanted = [x, delta, *block.parameters()]
        return [*out, *torch.autograd.grad(sum(part.sin().sum() for part in out), wanted)]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    for ours, eager in zip(gradients(compiled), gradients(run), strict=True):
        assert (ours - eager).abs().max() <= GRADIENT_RELATIVE * eager.abs().max()

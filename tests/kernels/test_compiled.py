"""Kernels compiled ahead of time for GPUs that need not be there; blocks under torch.compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from oracles import SMALL
from tolerances import GRADIENT_RELATIVE
from torch import Tensor

from shardlens.kernels.rope import rope_angles_reference
from shardlens.model import ModelConfig, Transformer, init_weights
from shardlens.model.transformer import causal_attention

CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module")
def compilers() -> dict[int, subprocess.Popen[str]]:
    """One process for each GPU, side by side; outside the interpreter, which compiles nothing."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "shardlens.bench.compiled", "--capability"]
    return {
        capability: subprocess.Popen(
            [*command, str(capability)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for capability in CAPABILITIES
    }


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spills(
    capability: int, compilers: dict[int, subprocess.Popen[str]]
) -> None:
    """Registers and spills are printed; none of the shipped configurations spills."""
    stdout, stderr = compilers[capability].communicate()
    assert compilers[capability].returncode == 0, stderr
    *table, last = stdout.splitlines()
    print("\n".join(table))
    built = json.loads(last)["kernels"]
    names = {kernel["kernel"] for kernel in built}
    assert len(names) >= 10 and "head_kernel" in names
    spilling = [kernel for kernel in built if kernel["spills"]]
    assert not spilling, spilling
    many = [k for k in built if k["case"] == "head_many" and k["kernel"] == "head_kernel"]
    expected = {80: {"HMMA"}, 90: {"HGMMA", "UTMALDG"}, 100: {"UTCHMMA", "UTMALDG"}}
    assert many and all(expected[capability] <= k["instructions"].keys() for k in many)


@pytest.mark.slow
def test_a_compiled_block_equals_the_eager_one(device: torch.device, either: str) -> None:
    """torch.compile(fullgraph=True) of a whole block, forward and backward."""
    config = ModelConfig.from_hf({**SMALL, "architectures": ["Qwen3ForCausalLM"], "head_dim": 16})
    model = Transformer(config).to(device)
    init_weights(model, std=0.2)
    block = model.blocks[1]
    positions = torch.arange(9, device=device)[None]
    rope = rope_angles_reference(positions, model._inv_freq.to(device), torch.float32)

    def run(x: Tensor, delta: Tensor) -> Any:
        return block(x, delta, 1, causal_attention(rope))

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

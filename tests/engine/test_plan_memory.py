"""The predictions of `plan` against what runs allocate, to the byte that PyTorch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_bytes import peak_tensor_bytes
from tolerances import PLANNED

import shardlens
from shardlens.engine import Plan, plan
from shardlens.model import Transformer

N_PROMPT, NEW = 300, 100
SPEC = shardlens.LensSpec
RUNS: dict[str, tuple[int, int, int, Any]] = {  # requests, prompt, new tokens, lens
    "generate": (1, N_PROMPT, NEW, None),
    "lens of a text": (1, N_PROMPT, 0, SPEC()),
    "live": (1, N_PROMPT, NEW, SPEC(positions="generated")),
    "live, whole text": (1, N_PROMPT, NEW, SPEC()),
    "deferred": (1, N_PROMPT, NEW, SPEC(mode="deferred")),
    "many points": (1, 40, 20, SPEC(points=("attn_out", "mlp_out", "resid_post"))),
    "batch": (3, 100, 20, SPEC()),
}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return shardlens.load("demo", dtype=getattr(torch, request.param), device="cpu").model


def planned(model: Transformer, batch: int, n_prompt: int, new: int, spec: Any) -> Plan:
    return plan(
        model.config,
        ranks=1,
        context=n_prompt + new,
        prompt=n_prompt,
        batch=batch,
        taps=0 if spec is None else len(spec.taps(model.config)),
        dtype=str(model.dtype).removeprefix("torch."),
        device_type="cpu",
        deferred=spec is not None and spec.mode == "deferred",
        reads_prompt=spec is not None and spec.positions == "all",
    )


@pytest.mark.parametrize("name", RUNS)
def test_agrees_with_what_is_measured(model: Transformer, name: str) -> None:
    batch, n_prompt, new, spec = RUNS[name]
    prompts = [list(range(5 + request, 5 + request + n_prompt)) for request in range(batch)]

    def run() -> None:
        torch.utils.deterministic.fill_uninitialized_memory = False
        shardlens.LanguageModel(model).generate(prompts, max_new_tokens=new, lens=spec, stop_ids=())

    measured = peak_tensor_bytes(run)
    foretold = planned(model, batch, n_prompt, new, spec)
    above = foretold.total_bytes - foretold.weights_bytes
    assert abs(above / measured - 1) <= PLANNED, (above, measured)
    weights = sum(p.nbytes for p in model.parameters())
    assert foretold.weights_bytes == weights


def test_deferred_keeps_a_ring_and_live_does_not(model: Transformer) -> None:
    """The bytes of the ring, and no more, are what deferred needs beside live."""
    prompts = [list(range(5, 25))]

    def run(mode: str) -> int:
        spec = SPEC(mode=mode, positions="generated", layers=[0, -1])
        return peak_tensor_bytes(
            lambda: shardlens.LanguageModel(model).generate(
                prompts, max_new_tokens=8, lens=spec, stop_ids=()
            )
        )

    by_plan = [
        planned(model, 1, 20, 8, SPEC(mode=mode, positions="generated", layers=[0, -1]))
        for mode in ("live", "deferred")
    ]
    ring = by_plan[1].taps_bytes - by_plan[0].taps_bytes
    assert ring == 64 * 2 * model.config.d * model.dtype.itemsize
    assert run("deferred") - run("live") >= ring

"""The plan against the real thing: parameters, cache and traffic; Llama 3.1 405B by hand."""

from __future__ import annotations

import dataclasses
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FAMILIES, LLAMA_405B, SMALL

from shardlens.engine import (
    GPUS,
    available_bytes,
    check_fits,
    device_memory_bytes,
    fewest_ranks,
    plan,
)
from shardlens.engine.limits import CAPTURED_ROWS, RING_TOKENS
from shardlens.engine.memory import chunk_tokens, fullest_share, head_bytes
from shardlens.engine.plan import GIB, gib
from shardlens.kernels import Chip
from shardlens.kernels.head_cut import cut, extra_bytes
from shardlens.model import ModelConfig, Transformer
from shardlens.parallel import TensorParallel, reduce_head


def small(name: str, **changes: Any) -> ModelConfig:
    family, options = FAMILIES[name]
    return ModelConfig.from_hf(
        {**SMALL, **options, **changes, "architectures": [f"{family}ForCausalLM"]}
    )


def rank_model(config: ModelConfig, rank: int, size: int) -> Transformer:
    group: Any = object() if size > 1 else None
    return Transformer(config, device="meta", parallel=TensorParallel(group, rank, size))


def bytes_of(model: Transformer) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_weights_are_those_of_the_fullest_rank(name: str, ranks: int) -> None:
    """509 ids and an MLP of 100 come out even for no rank count but one."""
    config = small(name)
    real = [bytes_of(rank_model(config, rank, ranks)) for rank in range(ranks)]
    assert plan(config, ranks=ranks, context=8).weights_bytes == max(real)
    if ranks == 3:
        assert max(real) > min(real)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama-mha", "llama-mqa", "qwen3"])
def test_cache_is_as_large_as_the_real_cache(name: str, ranks: int) -> None:
    config = small(name)
    cache = rank_model(config, ranks - 1, ranks).new_cache(3, 77)
    planned = plan(config, ranks=ranks, context=77, batch=3, device_type="cpu")
    assert planned.cache_bytes == cache.keys.nbytes + cache.values.nbytes


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sent_bytes_are_what_a_step_sends(run_ranks: Any, ranks: int) -> None:
    config, taps, top_k = small("llama-gqa-tied"), 4, 3

    def step(parallel: TensorParallel) -> int:
        model = Transformer(config, parallel=parallel)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model(torch.zeros(2, 1, dtype=torch.int64), cache=model.new_cache(2, 4))
            rows = torch.zeros(2 * (taps + 1), config.d)
            reduce_head(rows, model.head, k=top_k)
        return parallel.traffic.total_bytes

    sent = run_ranks(ranks, step)
    planned = plan(config, ranks=ranks, context=4, batch=2, taps=taps, top_k=top_k)
    assert sent == [planned.sent_bytes_per_token] * ranks


def test_llama_405b_by_hand() -> None:
    config = ModelConfig.from_hf(LLAMA_405B)
    alone = plan(config, ranks=1, context=8192)
    assert alone.weights_bytes == 2 * 405_853_388_800
    shared = plan(config, ranks=16, context=8192, batch=4, taps=126)
    # on 16 ranks: 8 query heads, 1 KV head (held twice in all), 3328 of the MLP, 8016 ids
    attention = 16384 * (2 * 8 * 128 + 2 * 128)
    block = attention + 3 * 3328 * 16384 + 2 * 16384
    assert shared.weights_bytes == 2 * (126 * block + 2 * 8016 * 16384 + 16384)
    assert shared.cache_bytes == 2 * 126 * 4 * 8192 * 128 * 2
    assert shared.taps_bytes == 2 * 4 * 16384 * (127 + 126) + 4 * 4 * (2 + 126 * 14)
    assert shared.moved_bytes_per_token == 2 * (
        126 * block
        + (1 + 8016 + 4 + 2 * 4 * 126) * 16384
        + 2 * 126 * 4 * 8193 * 128
    )  # fmt: skip
    assert shared.sent_bytes_per_token == 253 * (4 * 16384 * 2) * 2 * 15 // 16 + 4 * 127 * 64 * 15
    assert shared.flops_per_token == (
        2 * 4 * 126 * block + 2 * 4 * 127 * 8016 * 16384 + 4 * 126 * 4 * 8192 * 8 * 128
    )
    rate = shared.tokens_per_s(GPUS["h200"].bandwidth_bytes_per_s)
    assert rate == pytest.approx(4 * 4.8e12 / shared.moved_bytes_per_token)
    assert 300 < rate < 400


def test_parts_make_the_total() -> None:
    planned = plan(small("qwen3"), ranks=2, context=64, taps=3)
    assert planned.total_bytes == sum(planned.parts.values()) > planned.weights_bytes
    content = planned.to_dict()
    assert content["total_bytes"] == planned.total_bytes and content["ranks"] == 2


def test_a_lens_costs_what_its_states_take() -> None:
    config = small("llama-mha")
    without = plan(config, ranks=1, context=64)
    tapped = plan(config, ranks=1, context=64, taps=2)
    one_more = plan(config, ranks=1, context=64, taps=2, final_tapped=False)
    deferred = plan(config, ranks=1, context=64, taps=2, deferred=True)
    assert one_more == plan(config, ranks=1, context=64, taps=3)
    assert without.taps_bytes == 4 * config.d + 4 * 2
    assert deferred.taps_bytes - tapped.taps_bytes == RING_TOKENS * 2 * config.d * 4
    assert without.lens_workspace_bytes < tapped.lens_workspace_bytes
    assert without.moved_bytes_per_token < tapped.moved_bytes_per_token
    assert tapped.moved_bytes_per_token < deferred.moved_bytes_per_token


def test_batch_is_padded_where_steps_are_captured() -> None:
    config = small("llama-mha")
    five, eight = (plan(config, ranks=1, context=128, batch=batch) for batch in (5, 8))
    assert five.cache_bytes == eight.cache_bytes
    assert five.moved_bytes_per_token < eight.moved_bytes_per_token
    on_cpu = plan(config, ranks=1, context=128, batch=5, device_type="cpu")
    assert on_cpu.cache_bytes * 8 == eight.cache_bytes * 5
    assert on_cpu.runtime_bytes == 0


def test_a_captured_step_has_separate_memory() -> None:
    """A workspace of cuBLAS and its temporaries; eager products have another workspace."""
    config = ModelConfig.from_hf(LLAMA_405B)
    work = dict(ranks=8, context=8192, taps=126)
    captured, eager = (plan(config, **work, capture=capture) for capture in (True, False))
    assert eager.graph_bytes == 0 and "graph" in captured.parts
    assert captured.total_bytes - eager.total_bytes == captured.graph_bytes
    assert captured.runtime_bytes == eager.runtime_bytes == GIB + 32 * 2**20
    rows = 127  # normed, in bfloat16; what is read of them comes on top
    assert captured.graph_bytes > 32 * 2**20 + rows * config.d * 2
    assert plan(config, **work, batch=8).graph_bytes > captured.graph_bytes
    # an MLP's gate and up of many requests outgrow the reading without a lens
    narrow = small("llama-mha", intermediate_size=2**20)
    many = plan(narrow, ranks=1, context=64, batch=64)
    assert many.graph_bytes == 32 * 2**20 + 64 * (5 * narrow.d + 3 * 2**20) * 4
    on_cpu = plan(config, **work, device_type="cpu")
    assert on_cpu.graph_bytes == on_cpu.runtime_bytes == 0


def test_a_lens_shortens_prefill_chunks() -> None:
    config = ModelConfig.from_hf(LLAMA_405B)
    work = plan(config, ranks=8, context=8192, batch=4, taps=126).workload
    assert 126 * chunk_tokens(work) <= CAPTURED_ROWS < 126 * (chunk_tokens(work) + 1)
    assert chunk_tokens(plan(config, ranks=8, context=8192).workload) == 256
    assert chunk_tokens(plan(config, ranks=8, context=8192, taps=9999).workload) == 1


def test_thousands_of_ranks_cost_no_more_time() -> None:
    config = ModelConfig.from_hf(LLAMA_405B | dict(num_attention_heads=8192, head_dim=128))
    start = time.process_time()
    planned = plan(config, ranks=8192, context=8192)
    assert time.process_time() - start < 0.5
    assert planned.weights_bytes < plan(config, ranks=4096, context=8192).weights_bytes


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no ranks": (dict(ranks=0), "ranks 0 is below 1"),
    "context": (dict(context=129), "129 positions exceed the model's context of 128: use fewer"),
    "no context": (dict(context=0), "context 0 is below 1"),
    "batch": (dict(batch=0), "batch 0 is below 1"),
    "taps": (dict(taps=-1), "taps -1 is below 0"),
    "top-k": (dict(top_k=510), "top_k 510 is outside 1 to 509"),
    "dtype": (dict(dtype="int8"), "dtype int8 is not supported: only float32"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_requests_are_named(name: str) -> None:
    changes, says = BAD[name]
    with pytest.raises(ValueError, match=says):
        plan(small("llama-gqa-tied"), **{"ranks": 1, "context": 8, **changes})


def test_what_does_not_fit_says_what_would() -> None:
    config = ModelConfig.from_hf(LLAMA_405B)
    memory_bytes = 80 * GIB
    planned = plan(config, ranks=8, context=8192, taps=126)
    with pytest.raises(ValueError) as refused:
        check_fits(planned, memory_bytes, "Llama-3.1-405B")
    message = str(refused.value)
    start = "Llama-3.1-405B does not fit: each of 8 ranks needs 96.7 GiB (weights 94.5, cache 0.5, "
    assert message.startswith(start) and "\n" not in message
    assert f"graph {gib(planned.graph_bytes)}, runtime 1.0), the GPU has 80.0: use" in message
    assert "use 11 ranks, a shorter context" in message
    assert fewest_ranks(config, planned.workload, memory_bytes) == 11
    check_fits(plan(config, ranks=11, context=8192, taps=126), memory_bytes, "Llama-3.1-405B")
    with pytest.raises(ValueError, match="each of 10 ranks"):
        check_fits(plan(config, ranks=10, context=8192, taps=126), memory_bytes, "x")


def test_what_fits_nowhere_names_no_ranks() -> None:
    planned = plan(small("llama-mha"), ranks=1, context=64, device_type="cpu")
    assert fewest_ranks(planned.config, planned.workload, 1000) is None
    with pytest.raises(ValueError, match=r"x does not fit: it needs .* use a shorter context"):
        check_fits(planned, 1000, "x")
    assert fewest_ranks(planned.config, planned.workload, planned.total_bytes) == 1
    check_fits(planned, planned.total_bytes, "x")


def test_cpu_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(import_module("shardlens.engine.plan"), "available_bytes", lambda: 1000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert device_memory_bytes(cpu) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_memory_bytes(cpu) == 250


def test_available_memory_is_what_linux_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    7 kB\n")
    assert available_bytes(meminfo) == 7 * 1024
    assert available_bytes(tmp_path / "none") > 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_memory_is_all_of_it() -> None:
    assert device_memory_bytes(torch.device("cuda", 0)) >= torch.cuda.mem_get_info(0)[0]


@pytest.mark.parametrize("processors", [(80, 108), (89, 142), (90, 132), (100, 148)])
def test_the_heads_memory_is_that_of_its_kernel(processors: tuple[int, int]) -> None:
    """The prediction for CUDA covers what the kernel's cut takes, and not many times as much."""
    chip = Chip(*processors)
    config = small("llama-mha")
    for rows in (1, 16, 33, 64, 100, 129, 256, 600, 2112, 4096, 8192):
        for vocab in (16_032, 128_256):
            share = dataclasses.replace(fullest_share(config, 1), vocab=vocab)
            work = plan(config, ranks=1, context=64, top_k=5).workload
            work = dataclasses.replace(work, top_k=5)
            made = cut(rows, vocab, 1, 5, torch.bfloat16, chip, chip.has_wide_products)
            taken = extra_bytes(rows, made.shares, made.programs, 5, made.configs[0])
            foretold = head_bytes(share, work, rows, ranks=1)
            assert taken <= foretold, rows
            assert foretold <= 8 * taken + 1000 * rows, rows

"""Memory that a lens allocates and bytes that it sends, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import shardlens
from shardlens.model import ModelConfig, Transformer, init_weights
from shardlens.parallel import TensorParallel, VocabHead, reduce_head, split_vocab


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_peak_memory_is_a_twentieth_of_full_logits(ranks: int) -> None:
    """512 positions, 8 layers, 128,256 ids: peak resident memory of each rank's process."""
    launcher = ["-m", "shardlens.launcher", "-n", str(ranks)]
    command = [sys.executable, *launcher, "-m", "shardlens.bench.lens_memory"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["ranks"] == ranks and result["shape"]["vocab"] == 128_256
    assert 0 < result["peak_share_of_full_logits"] <= 0.05
    assert result["lens_bytes_sent_per_row_and_rank"] <= 8 * result["shape"]["k"] + 32
    assert (result["lens_bytes_sent_per_row_and_rank"] > 0) == (ranks > 1)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_bytes_sent_per_row(ranks: int, k: int, run_ranks: Any) -> None:
    """At most 8k + 32 bytes for each row and rank, with target, entropy, rank and KL."""
    rows = 60

    def body(parallel: TensorParallel) -> int:
        head = VocabHead(split_vocab(509, parallel.rank, parallel.size), 16, parallel=parallel)
        head.weight.data.normal_()
        reduce_head(
            torch.randn(rows, 16), head, k=k, target_ids=torch.arange(rows), rows_per_request=6
        )
        return parallel.traffic.total_bytes

    for sent in run_ranks(ranks, body):
        assert 8 * k * rows * (ranks - 1) < sent <= (8 * k + 32) * rows * (ranks - 1)


def test_a_whole_lens_sends_what_its_rows_need(run_ranks: Any) -> None:
    """Counted over a run: what the lens adds to the forward pass alone."""
    config = ModelConfig.from_hf(
        dict(
            architectures=["LlamaForCausalLM"],
            vocab_size=509,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
        )
    )
    ids = list(range(3, 90))

    def body(parallel: TensorParallel) -> tuple[int, int]:
        model = Transformer(config, parallel=parallel)
        init_weights(model)
        with torch.inference_mode():
            model(torch.tensor([ids]))
        forward = parallel.traffic.total_bytes
        parallel.traffic.reset()
        shardlens.LanguageModel(model).lens(ids, top_k=3)
        return forward, parallel.traffic.total_bytes

    rows = len(ids) * config.n_layers
    for forward, both in run_ranks(2, body):
        assert 0 < both - forward <= (8 * 3 + 32) * rows

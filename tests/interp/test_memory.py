"""What a lens allocates and what it sends, measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shardlens
from shardlens.model import ModelConfig, Transformer, init_weights
from shardlens.parallel.group import TensorParallel
from shardlens.parallel.shard import split_vocab
from shardlens.parallel.vocab import VocabHead
from shardlens.parallel.winners import reduce_head

POSITIONS, LAYERS, VOCAB, D = 512, 8, 128_256, 64

MEASURE = f"""
import sys
import torch
import torch.distributed as dist
import shardlens
from shardlens.model import ModelConfig, Transformer, init_weights

def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
rank, size = int(sys.argv[1]), int(sys.argv[2])
parallel = shardlens.TensorParallel.single()
if size > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=size)
    parallel = shardlens.TensorParallel.from_group()
config = ModelConfig.from_hf(dict(
    architectures=["LlamaForCausalLM"], vocab_size={VOCAB}, hidden_size={D},
    intermediate_size=128, num_hidden_layers={LAYERS}, num_attention_heads=4,
    max_position_embeddings=1024, tie_word_embeddings=True))
model = Transformer(config, parallel=parallel)
init_weights(model)
ids = torch.randint(0, {VOCAB}, ({POSITIONS},), generator=torch.Generator().manual_seed(0))
shardlens.lens(model, ids[:40])  # whatever is set up once
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
trace = shardlens.lens(model, ids)
assert trace.token_ids.shape == ({POSITIONS}, {LAYERS}, 5)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_peak_memory_is_a_twentieth_of_full_logits(ranks: int, tmp_path: Path) -> None:
    """512 positions, 8 layers, 128,256 ids: peak resident memory of each rank's process."""
    full_bytes = POSITIONS * LAYERS * VOCAB * 4
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, str(rank), str(ranks), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert 0 < int(out) <= 0.05 * full_bytes


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_bytes_sent_per_row(ranks: int, k: int, run_ranks: Any) -> None:
    """At most 8k + 32 bytes for each row and rank, with target, entropy, rank and KL."""
    rows = 60

    def body(parallel: TensorParallel) -> int:
        head = VocabHead(split_vocab(509, parallel.rank, parallel.size), 16, parallel=parallel)
        head.weight.data.normal_()
        reduce_head(torch.randn(rows, 16), head, k=k, target_ids=torch.arange(rows), group_size=6)
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
        shardlens.lens(model, ids, top_k=3)
        return forward, parallel.traffic.total_bytes

    rows = len(ids) * config.n_layers
    for forward, both in run_ranks(2, body):
        assert 0 < both - forward <= (8 * 3 + 32) * rows

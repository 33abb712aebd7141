"""Memory and traffic of a lens over a long text, against full logits.

    python -m torch.distributed.run --nproc-per-node 2 -m shardlens.bench.lens_memory

512 positions, 8 layers, 128,256 ids, on a model just wide enough: the memory of the lens depends
on rows and vocabulary, not on the model. Peak memory is resident memory as the kernel counts it,
above what the loaded model holds. Linux only.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from ..language_model import LanguageModel
from ..model import ModelConfig, Transformer, init_weights
from ..parallel import TensorParallel
from .report import emit, environment
from .timing import reset_peak, resident_bytes

POSITIONS, LAYERS, VOCAB, TOP_K = 512, 8, 128_256, 5
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 2 * POSITIONS,
    "tie_word_embeddings": True,
}


def read(lm: LanguageModel, token_ids: list[int]) -> None:
    """A lens of every layer over a text."""
    trace = lm.lens(token_ids, top_k=TOP_K)
    assert trace.token_ids.shape == (len(token_ids), LAYERS, TOP_K)


def forward_bytes(lm: LanguageModel, token_ids: list[int]) -> int:
    """The bytes that a forward pass alone sends."""
    traffic = lm.model.parallel.traffic
    traffic.reset()
    lm.generate(token_ids, max_new_tokens=0)
    return traffic.total_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", metavar="NAME", help="keep the result in bench/results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel = TensorParallel.from_env("cpu")
    model = Transformer(ModelConfig.from_hf(CONFIG), parallel=parallel)
    init_weights(model)
    lm = LanguageModel(model)
    ids = torch.randint(VOCAB, (POSITIONS,), generator=torch.Generator().manual_seed(0)).tolist()
    read(lm, ids[:2])  # whatever is set up once
    forward = forward_bytes(lm, ids)
    parallel.traffic.reset()
    reset_peak()
    before = resident_bytes("VmRSS")
    read(lm, ids)
    peak = resident_bytes("VmHWM") - before
    peaks: list[int | None] = [peak]
    if parallel.size > 1:
        peaks = [None] * parallel.size
        dist.all_gather_object(peaks, peak)
    rows, receivers = POSITIONS * LAYERS, max(1, parallel.size - 1)
    full = rows * VOCAB * 4
    result = {
        "benchmark": "lens_memory",
        "environment": environment(),
        "shape": {"positions": POSITIONS, "layers": LAYERS, "vocab": VOCAB, "k": TOP_K},
        "ranks": parallel.size,
        "full_logits_bytes": full,
        "peak_bytes_per_rank": peaks,
        "peak_share_of_full_logits": max(p for p in peaks if p is not None) / full,
        "lens_bytes_sent_per_row_and_rank": (parallel.traffic.total_bytes - forward)
        / (rows * receivers),
        "full_logits_bytes_per_row_and_rank": VOCAB * 4 / parallel.size,
    }
    if parallel.rank == 0:
        emit(result, arguments.save)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

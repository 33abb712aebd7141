"""Memory of a lens: over a long text, against full logits, and over a long generation.

    python -m shardlens.launcher -n 2 -m shardlens.bench.lens_memory
    python -m shardlens.bench.lens_memory --new-tokens 10000

A text: 512 positions, 8 layers, 128,256 ids, on a model just wide enough, since the memory of the
lens depends on rows and vocabulary; the bytes that ranks exchange for it are counted, too. A
generation, which a small random model writes: streamed, resident memory must not grow with the
text, as the key and value cache is there from the start; kept, it grows by what `plan` computes per
token. Memory is resident memory, above what the loaded model holds. Linux only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine import Engine, LensSpec, Request, Sampling, plan
from ..interp import Trace
from ..model import POINTS, ModelConfig, Transformer, init_weights
from ..parallel import TensorParallel, all_gather
from .models import model_config, random_model
from .report import argument_parser, emit, environment
from .timing import peak_resident_bytes, resident_bytes

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
PROMPT_TOKENS, N_MARKS = 8, 10


def read(engine: Engine, token_ids: list[int]) -> None:
    """A lens of every layer over a text."""
    (found,) = engine.run([Request(token_ids, 0, lens=LensSpec(top_k=TOP_K))])
    assert found.record is not None
    trace = Trace.from_record(found.record)
    assert trace.token_ids.shape == (len(token_ids), LAYERS, TOP_K)


def sent_bytes(parallel: TensorParallel, engine: Engine, token_ids: list[int]) -> int:
    """The bytes that a forward pass alone sends."""
    parallel.traffic.reset()
    engine.run([Request(token_ids, 0)])
    return parallel.traffic.total_bytes


def over_a_text(parallel: TensorParallel) -> dict[str, Any]:
    model = Transformer(ModelConfig.from_hf(CONFIG), parallel=parallel)
    init_weights(model)
    engine = Engine(model)
    ids = torch.randint(VOCAB, (POSITIONS,), generator=torch.Generator().manual_seed(0)).tolist()
    read(engine, ids[:2])  # whatever is set up once
    forward = sent_bytes(parallel, engine, ids)
    parallel.traffic.reset()
    peak = peak_resident_bytes(lambda: read(engine, ids))
    sent = parallel.traffic.total_bytes
    peaks = all_gather(torch.tensor(peak), parallel).tolist()
    rows, receivers = POSITIONS * LAYERS, max(1, parallel.size - 1)
    full = rows * VOCAB * 4
    return {
        "benchmark": "lens_memory",
        "environment": environment(),
        "shape": {"positions": POSITIONS, "layers": LAYERS, "vocab": VOCAB, "k": TOP_K},
        "ranks": parallel.size,
        "full_logits_bytes": full,
        "peak_bytes_per_rank": peaks,
        "peak_share_of_full_logits": max(peaks) / full,
        "lens_bytes_sent_per_row_and_rank": (sent - forward) / (rows * receivers),
        "full_logits_bytes_per_row_and_rank": VOCAB * 4 / parallel.size,
    }


def resident_over(engine: Engine, n_tokens: int, mode: str, streamed: bool) -> list[int]:
    """Resident bytes at N_MARKS + 1 evenly spaced tokens of a run, the first after a tenth."""
    every = n_tokens // (N_MARKS + 1)
    marks: list[int] = []
    n_known = n_read = 0

    def on_token(number: int, token: int) -> None:
        nonlocal n_known
        n_known += 1
        if n_known % every == 0:
            marks.append(resident_bytes("VmRSS"))

    def on_rows(generation: Any, positions: list[int], targets: list[int], rows: Tensor) -> None:
        nonlocal n_read
        n_read += len(Trace.from_rows(generation.record.taps, positions, targets, rows).positions)

    lens = LensSpec(points=POINTS, top_k=TOP_K, mode=mode, positions="generated")
    request = Request(range(PROMPT_TOKENS), n_tokens, Sampling(1.0), lens=lens, stop_ids=())
    engine.run([request], on_token=on_token, on_rows=on_rows if streamed else None)
    if streamed and n_read != n_tokens:
        raise ValueError(f"{n_read} positions were streamed, not {n_tokens}")
    return marks[: N_MARKS + 1]


def over_a_generation(n_tokens: int) -> dict[str, Any]:
    context = PROMPT_TOKENS + n_tokens
    config = dataclasses.replace(model_config("cpu-small"), context=context)
    parallel = TensorParallel.single()
    engine = Engine(random_model(config, parallel, torch.float32, torch.device("cpu")))
    resident_over(engine, 10 * (N_MARKS + 1), "live", True)  # whatever is set up once
    resident_over(engine, 10 * (N_MARKS + 1), "deferred", False)
    taps = config.n_layers * len(POINTS)
    planned = plan(config, ranks=1, context=context, taps=taps, top_k=TOP_K, device_type="cpu")
    streamed = resident_over(engine, n_tokens, "live", True)
    kept = resident_over(engine, n_tokens, "deferred", False)
    between = n_tokens // (N_MARKS + 1) * N_MARKS
    return {
        "benchmark": "long_run",
        "environment": environment(),
        "tokens": n_tokens,
        "taps": taps,
        "top_k": TOP_K,
        "streamed_growth_bytes_per_token": (streamed[-1] - streamed[0]) / between,
        "kept_growth_bytes_per_token": (kept[-1] - kept[0]) / between,
        "kept_computed_bytes_per_token": planned.kept_bytes_per_token,
        "streamed_resident_bytes": streamed,
        "kept_resident_bytes": kept,
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--new-tokens", type=int, metavar="N", help="of a generation, on one rank")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel = TensorParallel.from_env("cpu")
    if arguments.new_tokens is None:
        result = over_a_text(parallel)
    else:
        result = over_a_generation(arguments.new_tokens)
    if parallel.rank == 0:
        emit(result, arguments.save)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

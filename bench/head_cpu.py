"""The streaming head on one CPU thread, against full logits + topk + logsumexp.

    python -m shardlens.bench.head_cpu

512 rows, d 1,024, k 5, at the vocabularies of Llama 2 and 3. First the answers: ids and
log-sum-exp against float64. Then time, both by turns, and the peak of resident memory above
what is there before, each in a process of its own. The full logits are in the model's dtype,
as is usual; ours are float32 throughout, also of bf16 weights. A CPU without bf16 products makes
the bf16 baseline slow: `product_gflops` tells. Linux only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from ..kernels import head_stats_reference
from .report import argument_parser, emit, environment
from .timing import peak_resident_bytes, seconds_by_turns, spread

ROWS, WIDTH, TOP_K = 512, 1024, 5
SHAPES = [(dtype, vocab) for dtype in ("float32", "bfloat16") for vocab in (32_000, 128_256)]
CHECKED_ROWS = 32
TOLERANCE = 1e-5  # nats, log-sum-exp against float64
BLOCK = 4096  # ids whose weights are made or widened at a time


def streamed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    stats = head_stats_reference(x, weight, k=TOP_K).rows
    return stats.token_ids, stats.max + stats.sum_exp.log()


def full(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    z = x @ weight.T
    return z.topk(TOP_K).indices, z.logsumexp(-1)


IMPLS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "streamed": streamed,
    "full": full,
}


def problem(dtype: str, vocab: int) -> tuple[Tensor, Tensor]:
    """Rows x [R, d] and weight [V, d] whose logits are normal with deviation 1."""
    generator = torch.Generator().manual_seed(vocab)
    kind = getattr(torch, dtype)
    x = torch.randn(ROWS, WIDTH, generator=generator).to(kind)
    weight = torch.empty(vocab, WIDTH, dtype=kind)
    for part in weight.split(BLOCK):
        part.copy_(torch.randn(part.shape, generator=generator) / WIDTH**0.5)
    return x, weight


def check(x: Tensor, weight: Tensor) -> dict[str, float]:
    """Errors of some rows against float64; raises AssertionError where they are too large."""
    x = x[:: ROWS // CHECKED_ROWS]
    ids, logsumexp = streamed(x, weight)
    z = torch.cat([x.double() @ part.double().T for part in weight.split(BLOCK)], -1)
    exact = z.logsumexp(-1)
    error = (logsumexp - exact).abs().max().item()
    assert torch.equal(ids, z.topk(TOP_K).indices), "top-k ids differ from float64"
    assert error <= TOLERANCE, f"log-sum-exp is off by {error}"
    return {
        "logsumexp_error": error,
        "full_logsumexp_error": (full(x, weight)[1] - exact).abs().max().item(),
    }


def peak_bytes(impl: str, dtype: str, vocab: int) -> int:
    """Resident memory that one call adds at its peak. Call it in a fresh process."""
    torch.set_num_threads(1)
    x, weight = problem(dtype, vocab)
    with torch.inference_mode():
        IMPLS[impl](x[:2], weight[:BLOCK])  # whatever is set up once
        return peak_resident_bytes(lambda: IMPLS[impl](x, weight))


def fresh_peak_bytes(impl: str, dtype: str, vocab: int) -> int:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak_bytes, impl, dtype, vocab).result()


def product_gflops(dtype: str) -> float:
    """Speed of the plain product in a dtype, to tell native bf16 from emulated."""
    x, weight = problem(dtype, BLOCK)
    taken = seconds_by_turns({"product": lambda: x @ weight.T}, 4, x.device)["product"]
    return 2 * ROWS * WIDTH * BLOCK / min(taken) / 1e9


def measure(dtype: str, vocab: int, rounds: int) -> dict[str, Any]:
    x, weight = problem(dtype, vocab)
    errors = check(x, weight)
    runs = {name: partial(impl, x, weight) for name, impl in IMPLS.items()}
    # the first round does not count
    taken = {name: s[1:] for name, s in seconds_by_turns(runs, rounds + 1, x.device).items()}
    ratios = [ours / theirs for ours, theirs in zip(taken["streamed"], taken["full"], strict=True)]
    peaks = {impl: fresh_peak_bytes(impl, dtype, vocab) for impl in IMPLS}
    return {
        "dtype": dtype,
        "vocab": vocab,
        **errors,
        "seconds": {impl: spread(values) for impl, values in taken.items()},
        "time_ratio": min(taken["streamed"]) / min(taken["full"]),
        "time_ratio_per_round": spread(ratios),
        "peak_bytes": peaks,
        "peak_share": peaks["streamed"] / peaks["full"],
    }


def row(result: dict[str, Any]) -> str:
    best = [result["seconds"][impl]["best"] * 1e3 for impl in ("streamed", "full")]
    peaks = [result["peak_bytes"][impl] / 2**20 for impl in ("streamed", "full")]
    return (
        f"{result['dtype']:<9}{result['vocab']:>8}{best[0]:>10,.0f}{best[1]:>8,.0f}"
        f"{result['time_ratio']:>7.2f}{peaks[0]:>12.1f}{peaks[1]:>8.1f}{result['peak_share']:>8.1%}"
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, at least 2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("dtype       vocab  ours, ms    full  ratio   ours, MiB    full   share", flush=True)
    results = []
    with torch.inference_mode():
        for dtype, vocab in SHAPES:
            results.append(measure(dtype, vocab, arguments.rounds))
            print(row(results[-1]), flush=True)
        gflops = {dtype: product_gflops(dtype) for dtype in ("float32", "bfloat16")}
    result = {
        "benchmark": "head_cpu",
        "environment": environment() | {"cpu_capability": torch.backends.cpu.get_cpu_capability()},
        "shape": {"rows": ROWS, "d": WIDTH, "k": TOP_K},
        "rounds": arguments.rounds,
        "product_gflops": gflops,
        "results": results,
    }
    emit(result, arguments.save)


if __name__ == "__main__":
    main()

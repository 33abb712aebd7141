"""Time and memory of the arms of `bench end-to-end`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .baselines import ArmOutput
from .report import reset_peak, resident_bytes
from .timing import synchronize

TOP_K = 5
UNCACHED = ("1 baseline", "2 baseline half")
ORACLE = "3 transformers lens"  # that all other arms' answers are held against
PAPER, PAPER_BY_LAYER = "4 paper's method", "4 the same, by layer"
PLAIN, LENS, STEERED = OWN = ("5 shardlens", "6 shardlens lens", "7 shardlens lens steered")

# (prompt, new tokens, winners kept, called with each token) of an arm
Run = Callable[..., ArmOutput]
# Called with an arm's name and figures each time that it was run.
OnArm = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Setup:
    """What is run: a shape of `models.py`, and how much of it."""

    shape: str
    dtype: torch.dtype
    device: torch.device
    prompt_tokens: int
    new_tokens: int
    rounds: int

    def prompt(self, vocab_size: int) -> list[int]:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(vocab_size, (self.prompt_tokens,), generator=generator).tolist()

    def text(self, vocab_size: int, length: int) -> list[int]:
        """The prompt, repeated up to a length."""
        prompt = self.prompt(vocab_size)
        return (prompt * (length // len(prompt) + 1))[:length]

    @property
    def sampled_lengths(self) -> tuple[int, int, int]:
        """At which an uncached arm's tokens are timed: first, middle and last."""
        last = self.prompt_tokens + self.new_tokens - 1
        return self.prompt_tokens, (self.prompt_tokens + last) // 2, last


@dataclass
class Sample:
    """One run of an arm."""

    seconds: float
    first_token_seconds: float
    allocated_bytes: int | None = None  # at the peak, weights included, where the device counts


def timed(run: Run, prompt: list[int], n: int, device: torch.device) -> Sample:
    first: list[float] = []

    def on_token(token: int) -> None:
        if not first:
            first.append(time.perf_counter())

    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    started = time.perf_counter()
    run(prompt, n, TOP_K, on_token)
    synchronize(device)
    seconds = time.perf_counter() - started
    allocated = torch.cuda.max_memory_allocated(device) if on_cuda else None
    return Sample(seconds, first[0] - started, allocated)


def measure_times(
    arms: dict[str, Run], setup: Setup, vocab_size: int, on_arm: OnArm | None = None
) -> dict[str, dict[str, Any]]:
    """Rounds of all cached arms by turns; uncached ones once for each length."""
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str, figures: dict[str, Any]) -> None:
        found[name] = figures
        if on_arm is not None:
            on_arm(name, figures)

    prompt = setup.prompt(vocab_size)
    cached = [name for name in arms if name not in UNCACHED]
    samples: dict[str, list[Sample]] = {name: [] for name in cached}
    for turn in range(setup.rounds):
        first = turn % max(1, len(cached))
        for name in cached[first:] + cached[:first]:
            samples[name].append(timed(arms[name], prompt, setup.new_tokens, setup.device))
            keep(name, _summary(samples[name], setup.new_tokens))
    for name in (name for name in arms if name in UNCACHED):
        keep(name, _uncached(arms[name], setup, vocab_size))
    return found


def _summary(samples: list[Sample], n_tokens: int) -> dict[str, Any]:
    rates = [n_tokens / sample.seconds for sample in samples]
    fifths = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else rates * 9
    return {
        "tokens_per_s": max(rates),
        "tokens_per_s_p20_p50_p80": [fifths[1], fifths[4], fifths[7]],
        "first_token_ms": 1e3 * min(sample.first_token_seconds for sample in samples),
        "seconds": [sample.seconds for sample in samples],
        "allocated_bytes": max((s.allocated_bytes or 0 for s in samples), default=0),
        "extrapolated": False,
    }


def _uncached(run: Run, setup: Setup, vocab_size: int) -> dict[str, Any]:
    """Seconds of single tokens at three lengths, added up over all with straight lines between."""
    lengths = setup.sampled_lengths
    longest = setup.text(vocab_size, lengths[-1])
    samples = [timed(run, longest[:length], 1, setup.device) for length in lengths]
    seconds = [sample.seconds for sample in samples]
    total = 0.0
    for length in range(setup.prompt_tokens, lengths[-1] + 1):
        low = 0 if length <= lengths[1] else 1
        share = (length - lengths[low]) / max(1, lengths[low + 1] - lengths[low])
        total += seconds[low] + share * (seconds[low + 1] - seconds[low])
    return {
        "tokens_per_s": setup.new_tokens / total,
        "first_token_ms": 1e3 * seconds[0],
        "seconds_of_a_token": dict(zip(map(str, lengths), seconds, strict=True)),
        "allocated_bytes": max(sample.allocated_bytes or 0 for sample in samples),
        "extrapolated": True,
    }


def peak_bytes(run: Run, name: str, setup: Setup, vocab_size: int) -> int:
    """The most resident memory that a whole run holds above what is there before it."""
    prompt, n_tokens = setup.prompt(vocab_size), setup.new_tokens
    if name in UNCACHED:  # its last token takes the most
        prompt, n_tokens = setup.text(vocab_size, setup.sampled_lengths[-1]), 1
    run(prompt[:2], 2, TOP_K, None)  # whatever is set up once
    reset_peak()
    before = resident_bytes("VmRSS")
    run(prompt, n_tokens, TOP_K, None)
    return resident_bytes("VmHWM") - before

"""The runs of `bench end-to-end`, by name: made on the weights of one model, checked, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine, LensSpec, Request, Steering
from ..interp import Trace
from ..model import Transformer
from .baselines import (
    CachedLens,
    FaithfulBaseline,
    OnToken,
    PaperMethod,
    RunOutput,
    read_with_moved_mlp_inputs,
)
from .models import as_transformers
from .timing import by_turns, peak_resident_bytes, spread, synchronize

TOP_K = 5
UNCACHED = ("1 baseline", "2 baseline half")
ORACLE = "3 transformers lens"  # that all other answers are held against
PAPER, PAPER_BY_LAYER = "4 paper's method", "4 the same, by layer"
PLAIN, LENS, STEERED = OURS = ("5 shardlens", "6 shardlens lens", "7 shardlens lens steered")
WARM_TOKENS = 3
OTHER_DTYPE = "the weights are held in the other dtype"
# Nats by which log-probs may differ, and within which two ids may change ranks. A half dtype
# rounds every state on its way through the layers, and other kernels round it elsewhere.
NATS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}

# (prompt, new tokens, candidates kept, called with each token)
Run = Callable[..., RunOutput]
# Called with a run's name and figures each time that it was run.
OnFigures = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Setup:
    """The task: a model of `models.py`, and how many tokens of what."""

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
    def n_tokens(self) -> int:
        """The length of the text at its end."""
        return self.prompt_tokens + self.new_tokens

    @property
    def sampled_lengths(self) -> tuple[int, int, int]:
        """The lengths at which a run without cache is timed: first, middle and last."""
        last = self.n_tokens - 1
        return self.prompt_tokens, (self.prompt_tokens + last) // 2, last


@dataclass(frozen=True)
class OurRun:
    """Greedy generation; every block's resid_post is read live where there is a lens."""

    engine: Engine
    lens: bool = False
    steering: Sequence[Steering] = ()

    def run(
        self, prompt: list[int], max_new_tokens: int, top_k: int, on_token: OnToken | None = None
    ) -> RunOutput:
        spec = LensSpec(top_k=top_k, targets=None, positions="generated")
        request = Request(
            prompt,
            max_new_tokens,
            steering=self.steering,
            lens=spec if self.lens else None,
            stop_ids=(),
        )
        (found,) = self.engine.run(
            [request], on_token=None if on_token is None else lambda number, token: on_token(token)
        )
        if found.record is None:
            return RunOutput(found.tokens, None, None)
        trace = Trace.from_record(found.record)
        return RunOutput(found.tokens, trace.token_ids, trace.logprobs)


def random_vector(model: Transformer) -> Tensor:
    """A vector [d] about as long as a normed row."""
    return torch.randn(model.config.d, generator=torch.Generator().manual_seed(0))


def all_runs(model: Transformer) -> dict[str, Run]:
    """On several ranks only shardlens's: the others run on one."""
    ours = our_runs(model)
    return ours if model.parallel.size > 1 else {**rival_runs(model), **ours}


def our_runs(model: Transformer) -> dict[str, Run]:
    """One engine runs them all. Steering adds a vector to the MLP's input in all layers."""
    engine = Engine(model)
    steering = Steering(random_vector(model), point="mlp_norm", positions="generated")
    return {
        PLAIN: OurRun(engine).run,
        LENS: OurRun(engine, lens=True).run,
        STEERED: OurRun(engine, lens=True, steering=[steering]).run,
    }


def rival_runs(model: Transformer) -> dict[str, Run]:
    hf = as_transformers(model)
    return {
        UNCACHED[0] if model.dtype == torch.float32 else UNCACHED[1]: FaithfulBaseline(hf).run,
        ORACLE: CachedLens(hf).run,
        PAPER: PaperMethod(hf).run,
        PAPER_BY_LAYER: PaperMethod(hf, by_layer=True).run,
    }


def without_what_does_not_fit(
    runs: dict[str, Run], setup: Setup, vocab_size: int
) -> tuple[dict[str, Run], dict[str, str]]:
    """(runs, why the others are left out): rivals hold logits that a card may have no room for."""
    left_out = {name: OTHER_DTYPE for name in UNCACHED if name not in runs}
    for name in [name for name in UNCACHED if name in runs]:
        try:
            runs[name](setup.text(vocab_size, setup.sampled_lengths[-1]), 1, TOP_K, None)
        except (ValueError, torch.OutOfMemoryError) as error:
            left_out[name] = str(error).splitlines()[0]
            if setup.device.type == "cuda":
                torch.cuda.empty_cache()
    return {name: run for name, run in runs.items() if name not in left_out}, left_out


def problems(
    model: Transformer, runs: dict[str, Run], prompt: list[int], n_tokens: int, top_k: int
) -> dict[str, list[str]]:
    """The problems of each run whose answers are wrong; empty where all is well.

    Each is held against transformers, where that is among the runs. A lens that changes the text
    is said of both runs that differ.
    """
    nats = NATS[model.dtype]
    found: dict[str, list[str]] = {}
    answers = {}
    for name, run in runs.items():
        n = 2 if name in UNCACHED else n_tokens  # without a cache each token takes seconds
        answers[name] = run(prompt, n, top_k, None)
    compared = [name for name in answers if name not in (ORACLE, PLAIN, STEERED)]
    for name in compared if ORACLE in answers else ():
        if difference := disagreement(answers[ORACLE], answers[name], nats):
            found.setdefault(name, []).append(difference)
    ours, plain, steered = (answers.get(name) for name in (LENS, PLAIN, STEERED))
    if ours is not None and plain is not None and plain.token_ids != ours.token_ids:
        for name in (PLAIN, LENS):
            found.setdefault(name, []).append("the lens changes the text")
    if steered is not None:
        moved = ours is None or steered.token_ids != ours.token_ids
        if ours is not None and not moved and _largest_gap(steered, ours) <= nats:
            found.setdefault(STEERED, []).append("steering has no effect")
        if model.parallel.size == 1:
            move = random_vector(model).to(model.device, model.dtype)
            hooked = read_with_moved_mlp_inputs(
                as_transformers(model), prompt, steered.token_ids, move, top_k
            )
            if difference := disagreement(steered, hooked, nats):
                found.setdefault(STEERED, []).append(f"steering against hooks: {difference}")
    return found


def disagreement(expected: RunOutput, found: RunOutput, nats: float) -> str | None:
    """Where top-1 ids or log-probs differ by more than rounding explains, up to the first token
    that a near tie turned.
    """
    assert expected.lens_ids is not None and expected.lens_logprobs is not None
    assert found.lens_ids is not None and found.lens_logprobs is not None
    pairs = zip(expected.token_ids, found.token_ids, strict=False)
    for step, (expected_token, found_token) in enumerate(pairs):
        logprobs = expected.lens_logprobs[step]  # [L, k]
        margin = logprobs[:, 0] - logprobs[:, 1]
        differs = expected.lens_ids[step, :, 0] != found.lens_ids[step, :, 0]
        clear = differs & (margin > 2 * nats)
        if clear.any():
            return f"top-1 of new token {step} at layer {int(clear.nonzero()[0])}"
        gap = (logprobs[:, 0] - found.lens_logprobs[step, :, 0]).abs().max()
        if gap > nats:
            return f"log-probs of new token {step} differ by {float(gap):.3g} nats"
        if expected_token != found_token:
            return None if margin[-1] <= 2 * nats else f"new token {step}"
    return None


def _largest_gap(a: RunOutput, b: RunOutput) -> float:
    assert a.lens_logprobs is not None and b.lens_logprobs is not None
    return float((a.lens_logprobs[:, -1] - b.lens_logprobs[:, -1]).abs().max())


def warm(runs: dict[str, Run], setup: Setup, vocab_size: int) -> None:
    """Whatever is set up once.

    On a GPU our first run reads a text as long as the timed ones become: the cache that is made for
    it, and the steps that are captured over it, serve them all.
    """
    if setup.device.type == "cuda" and PLAIN in runs:
        runs[PLAIN](setup.text(vocab_size, setup.n_tokens), 0, TOP_K, None)
    for name, run in runs.items():
        if name not in UNCACHED:
            run(setup.prompt(vocab_size), WARM_TOKENS, TOP_K, None)


@dataclass
class Sample:
    """The time and memory of one run."""

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
    runs: dict[str, Run], setup: Setup, vocab_size: int, on_figures: OnFigures | None = None
) -> dict[str, dict[str, Any]]:
    """Rounds of all cached runs by turns; uncached ones once for each length."""
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str, figures: dict[str, Any]) -> None:
        found[name] = figures
        if on_figures is not None:
            on_figures(name, figures)

    prompt = setup.prompt(vocab_size)
    samples: dict[str, list[Sample]] = {name: [] for name in runs if name not in UNCACHED}
    for name in by_turns(list(samples), setup.rounds):
        samples[name].append(timed(runs[name], prompt, setup.new_tokens, setup.device))
        keep(name, _summary(samples[name], setup.new_tokens))
    for name in [name for name in UNCACHED if name in runs]:
        keep(name, _uncached(runs[name], setup, vocab_size))
    return found


def _summary(samples: list[Sample], n_tokens: int) -> dict[str, Any]:
    rates = [n_tokens / sample.seconds for sample in samples]
    percentiles = spread(rates if len(rates) > 1 else rates * 2)
    return {
        "tokens_per_s": max(rates),
        "tokens_per_s_p20_p50_p80": [percentiles[name] for name in ("p20", "p50", "p80")],
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
        "seconds_per_token_at": dict(zip(map(str, lengths), seconds, strict=True)),
        "allocated_bytes": max(sample.allocated_bytes or 0 for sample in samples),
        "extrapolated": True,
    }


def peak_bytes(run: Run, name: str, setup: Setup, vocab_size: int) -> int:
    """The most resident memory that a whole run holds above what is there before it."""
    prompt, n_tokens = setup.prompt(vocab_size), setup.new_tokens
    if name in UNCACHED:  # its last token takes the most
        prompt, n_tokens = setup.text(vocab_size, setup.sampled_lengths[-1]), 1
    run(prompt[:2], 2, TOP_K, None)  # whatever is set up once
    return peak_resident_bytes(lambda: run(prompt, n_tokens, TOP_K, None))

"""The time that a monitor adds to a training: that of `examples/train_demo.py`.

    python -m shardlens.bench.monitor --save monitor

Three copies of the model are trained on the same batches, a step each by turns: without a monitor,
with one that never looks, and with one that looks at 1 of 100 steps. Looks are few then, so that
their cost is taken from further steps: a fourth copy looks at each of them, and the first at none.
A call of `at` for a step that is not looked at is timed by itself, too: it is all that a monitor
does there. A step has two micro-batches, and both are read. Needs the repository's `examples/`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..interp import LayerMetrics, LensMonitor, watch
from ..interp.monitor import POSITIONS
from ..model import DEMO, ModelConfig, Transformer, init_weights
from ..tokenizer import Tokenizer
from .processes import ROOT
from .report import argument_parser, emit, environment
from .timing import by_turns, one_thread, spread

NEVER, EVERY, N_CALLS = 10**9, 100, 100_000
NO_TARGET = -100
At = Callable[[int, Tensor], AbstractContextManager[None]]
Batch = tuple[Tensor, Tensor]  # token ids and the weight of each as a target, both [B, T]


def demo_config() -> ModelConfig:
    return ModelConfig.from_hf(json.loads((DEMO / "config.json").read_text(encoding="utf-8")))


class Training:
    """A copy of the model, and its steps."""

    def __init__(self, example: Any, at: Callable[[Transformer], At]) -> None:
        self._example = example
        self.model = Transformer(demo_config())
        init_weights(self.model, seed=0, std=0.05)
        self._rules = example.optimizers(self.model)
        self._at = at(self.model)

    def step(self, step: int, micro_batches: list[Batch]) -> float:
        """Train; the seconds that it took."""
        started = time.perf_counter()
        total = sum(weights[:, 1:].sum() for _, weights in micro_batches)
        for ids, weights in micro_batches:
            with self._at(step, targets_of(ids, weights)):
                losses = self._example.token_losses(self.model, ids)
            ((losses * weights[:, 1:]).sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for rule in self._rules:
            rule.step()
            rule.zero_grad()
        return time.perf_counter() - started


def targets_of(ids: Tensor, weights: Tensor) -> Tensor:
    return ids[:, 1:].where(weights[:, 1:] > 0, NO_TARGET)


def monitored(every: int, found: list[LayerMetrics]) -> Callable[[Transformer], At]:
    return lambda model: LensMonitor(model, every=every, to=found.append).at


def call_seconds() -> float:
    """The time of `at`, entered and left, for a step that is not looked at."""
    model = Transformer(demo_config())
    monitor, targets = LensMonitor(model, every=NEVER, to=print), torch.zeros(1, 1)
    started = time.perf_counter()
    for step in range(1, N_CALLS + 1):
        with monitor.at(step, targets):
            pass
    return (time.perf_counter() - started) / N_CALLS


@torch.no_grad()
def difference_from_full_logits(model: Transformer, batch: Batch) -> float:
    """The largest of a layer's loss, in nats, over all positions of a batch."""
    ids, targets, found = batch[0][:, :-1], targets_of(*batch), list[LayerMetrics]()
    monitor = LensMonitor(model, every=1, positions=ids.numel(), to=found.append)
    with monitor.at(0, targets):
        model(ids)
    with watch(model) as watching:
        model(ids)
    valid, states = targets >= 0, watching.stacked().double()  # [B, T, L, d]
    weight, eps = model.norm.weight.double(), model.config.norm_eps
    normed = states * (states.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    logprobs = (normed[valid] @ model.head.weight.double().T).log_softmax(-1)  # [N, L, V]
    wanted = targets[valid][:, None, None].expand(-1, logprobs.shape[1], 1)
    losses = -logprobs.gather(-1, wanted)[..., 0].mean(0)
    return float((losses - torch.tensor(found[0].loss, dtype=torch.float64)).abs().max())


def paired(times: dict[str, list[float]], name: str) -> float:
    """The median of what a step takes more than without a monitor."""
    pairs = zip(times[name], times["without"], strict=True)
    return statistics.median(left - right for left, right in pairs)


def measured(n_steps: int, n_looks: int) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "examples"))
    example = import_module("train_demo")
    tokenizer = Tokenizer.from_directory(DEMO)
    stream = example.batches(tokenizer, "train 0", example.BATCH)
    found: list[LayerMetrics] = []
    trainings = {
        "without": Training(example, lambda model: lambda step, targets: nullcontext()),
        "never_looks": Training(example, monitored(NEVER, found)),
        "looks_at_1_of_100": Training(example, monitored(EVERY, found)),
        "looks": Training(example, monitored(1, found)),
    }
    names = list(trainings)
    times: dict[str, list[float]] = {name: [] for name in names}
    turns = by_turns(names[:3], n_steps)
    for step, micro_batches in zip(range(1, n_steps + 1), stream, strict=False):
        for name in islice(turns, 3):
            times[name].append(trainings[name].step(step, micro_batches))
    looks: dict[str, list[float]] = {"without": [], "looks": []}
    for step, micro_batches in zip(range(1, n_looks + 1), stream, strict=False):
        for name in ("without", "looks") if step % 2 else ("looks", "without"):
            looks[name].append(trainings[name].step(step, micro_batches))
    usual, call, look = statistics.median(times["without"]), call_seconds(), paired(looks, "looks")
    n_calls = example.MICRO_BATCHES
    return {
        "benchmark": "monitor",
        "environment": environment(),
        "shape": {
            "layers": trainings["looks"].model.config.n_layers,
            "d": trainings["looks"].model.config.d,
            "vocab": trainings["looks"].model.config.vocab_size,
            "texts_per_step": example.BATCH,
            "micro_batches": n_calls,
            "positions_per_look": n_calls * POSITIONS,
        },
        "steps_each": n_steps,
        "looks": n_looks,
        "step_ms": {name: times_ms(times[name]) for name in names[:3]},
        "look_ms": look * 1e3,
        "call_not_looked_at_us": call * 1e6,
        "share_added_by_calls": n_calls * call / usual,
        "share_added_without_looks": paired(times, "never_looks") / usual,
        "share_added_by_1_look_in_100": look / EVERY / usual + n_calls * call / usual,
        "share_added_in_all": sum(times["looks_at_1_of_100"]) / sum(times["without"]) - 1,
        "loss_off_full_logits_nats": difference_from_full_logits(
            trainings["looks"].model, next(stream)[0]
        ),
    }


def times_ms(seconds: list[float]) -> dict[str, float]:
    return {name: value * 1e3 for name, value in spread(seconds).items()}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of each copy (default 300)")
    parser.add_argument("--looks", type=int, default=30, help="further steps (default 30)")
    arguments = parser.parse_args()
    with one_thread():
        emit(measured(arguments.steps, arguments.looks), arguments.save)


if __name__ == "__main__":
    main()

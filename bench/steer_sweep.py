"""A sweep of steering in one pass, against a forward pass for every layer and multiplier.

    shardlens bench steer-sweep [--rounds 5] [--save NAME]

A random model with 16 layers and one prompt of 200 tokens. Every layer's resid_post is steered on
its own, at 7 multipliers: 112 variants, of which the propensity of two labels is asked as the
paper asks it, with the last position edited (arXiv 2604.06483). They run as branches of one prompt,
or with the whole prompt run again for each, of which two logits are read. Both ways must
give the same propensities before either is timed. Then they take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..engine import Steering
from ..engine.edit_table import EditTable, RequestEdits, TableShape
from ..interp import MULTIPLIERS, Item, Variants, propensities
from ..model import ModelConfig, Tap, Transformer
from ..parallel import TensorParallel, token_logits
from .models import random_model
from .report import environment, print_verdicts, verdict
from .timing import measured_rates, one_thread, seconds_by_turns, spread

NATS = 1e-5  # by which propensities may differ
EFFECT = 10 * NATS  # what steering a layer must at least do: what does nothing agrees, too
LEAST_RATIO = 30.0  # claimed of the times, for SHAPE
VECTOR_STD = 0.1  # of a vector's numbers: about as long as the states of such a model
ONE_PASS, SEPARATE = "one pass", "a pass each"


@dataclass(frozen=True)
class SweepShape:
    n_layers: int = 16
    d: int = 512
    n_heads: int = 8
    ffn: int = 1536
    vocab: int = 8000
    prompt_tokens: int = 200

    def config(self) -> ModelConfig:
        content: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.d,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "max_position_embeddings": 2 * self.prompt_tokens,
        }
        return ModelConfig.from_hf(content)


SHAPE = SweepShape()


@dataclass(frozen=True)
class Sweep:
    """The task: a prompt, two labels that may follow, and a vector per layer."""

    prompt: list[int]
    label_ids: tuple[int, int]
    vectors: Tensor  # [L, d] float32

    @classmethod
    def random(cls, shape: SweepShape, device: torch.device) -> Sweep:
        generator = torch.Generator().manual_seed(1)
        n = shape.prompt_tokens
        prompt = torch.randint(shape.vocab, (n,), generator=generator).tolist()
        vectors = torch.randn(shape.n_layers, shape.d, generator=generator) * VECTOR_STD
        return cls(prompt, (shape.vocab // 3, shape.vocab // 2), vectors.to(device))


Impl = Callable[[Transformer, Sweep], Tensor]  # [L, K] propensities


def one_pass(model: Transformer, sweep: Sweep) -> Tensor:
    n_layers, n_steps = len(sweep.vectors), len(MULTIPLIERS)
    variants = Variants(
        [Tap(layer, "resid_post") for layer in range(n_layers) for _ in MULTIPLIERS],
        vectors=sweep.vectors.to(model.dtype),
        rows=torch.arange(n_layers, device=model.device).repeat_interleave(n_steps),
        scales=torch.tensor(MULTIPLIERS, device=model.device).repeat(n_layers),
    )
    item = Item(sweep.prompt[:-1], [sweep.prompt[-1:]], sweep.label_ids)
    return propensities(model, item, variants).view(n_layers, n_steps)


@torch.no_grad()
def separate(model: Transformer, sweep: Sweep) -> Tensor:
    """No cache, one variant at a time, and no logits but the two."""
    ids = torch.tensor([sweep.prompt], device=model.device)
    labels = torch.tensor(sweep.label_ids, device=model.device)
    n = len(sweep.prompt)
    rows = []
    for layer, vector in enumerate(sweep.vectors):
        for multiplier in MULTIPLIERS:
            steering = Steering(vector, [layer], scale=multiplier, positions="last_prompt")
            last = model(ids, edits=_edits(model, steering, n).at)[:, -1]
            rows.append(token_logits(model.norm(last), model.head, labels)[0])
    logits = torch.stack(rows).double().cpu()
    return (logits[:, 0] - logits[:, 1]).view(len(sweep.vectors), -1)


def _edits(model: Transformer, steering: Steering, n_tokens: int) -> EditTable:
    edits = RequestEdits([steering], n_tokens, n_tokens, model.config.n_layers)
    shape = TableShape.of([edits])
    assert shape is not None
    device, dtype = model.device, model.dtype
    table = EditTable(
        model.config, shape, 1, n_tokens, dtype=dtype, device=device, every_site=False
    )
    table.put(0, edits)
    return table


IMPLS: dict[str, Impl] = {ONE_PASS: one_pass, SEPARATE: separate}


def counted_rows(impl: Impl, model: Transformer, sweep: Sweep) -> tuple[Tensor, int]:
    """(its propensities, how many tokens it sent through each block)."""
    rows = 0

    def count(block: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += inputs[0][..., 0].numel()

    handle = model.blocks[0].register_forward_pre_hook(count)
    try:
        return impl(model, sweep), rows
    finally:
        handle.remove()


def problem(found: Tensor, expected: Tensor) -> str | None:
    """Why propensities [L, K] of one pass are not those expected; None where they are."""
    error = float((found - expected).abs().max())
    if not error <= NATS:  # nor is a NaN
        return f"propensities of the one pass are {error:.3g} nats off"
    steps = torch.tensor(MULTIPLIERS)
    least = float((expected - expected[:, steps == 0]).abs().amax(1).min())
    if least < EFFECT:
        return f"steering a layer moves its propensity by at most {least:.3g} nats"
    return None


def steer_sweep(
    rounds: int,
    device: torch.device,
    shape: SweepShape = SHAPE,
    impls: dict[str, Impl] = IMPLS,
) -> dict[str, Any]:
    """The whole benchmark, on one thread. Raises ValueError naming what a check found wrong."""
    with one_thread(), torch.inference_mode():
        model = random_model(shape.config(), TensorParallel.single(), torch.float32, device)
        sweep = Sweep.random(shape, device)
        answers = {name: counted_rows(impl, model, sweep) for name, impl in impls.items()}
        found, expected = (answers[name][0] for name in (ONE_PASS, SEPARATE))
        red = problem(found, expected)
        if red:
            raise ValueError(f"a check is red, nothing is measured: {red}")
        print("checks: green", flush=True)
        rates = measured_rates(device, torch.float32, 2.0)
        runs = {name: partial(impl, model, sweep) for name, impl in impls.items()}
        taken = seconds_by_turns(runs, rounds, device)
        head = environment()
    block_weights = sum(weight.numel() for weight in model.blocks.parameters() if weight.ndim == 2)
    measured = {
        name: _figures(seconds, answers[name][1], block_weights, rates.matrix_flop_per_s)
        for name, seconds in taken.items()
    }
    ratios = [b / a for a, b in zip(taken[ONE_PASS], taken[SEPARATE], strict=True)]
    result: dict[str, Any] = {
        "benchmark": "steer_sweep",
        "environment": head,
        "device": device.type,
        "dtype": "float32",
        "shape": vars(shape),
        "multipliers": list(MULTIPLIERS),
        "variants": expected.numel(),
        "rounds": rounds,
        "largest_difference_nats": float((found - expected).abs().max()),
        "matrix_gflop_per_s": rates.matrix_flop_per_s / 1e9,
        "impls": measured,
        "rows_ratio": measured[SEPARATE]["rows"] / measured[ONE_PASS]["rows"],
        "time_ratio": min(taken[SEPARATE]) / min(taken[ONE_PASS]),
        "time_ratio_per_round": {"least": min(ratios), "most": max(ratios), "p50": median(ratios)},
    }
    return result | {"claims": claims(result)}


def _figures(
    seconds: list[float], rows: int, block_weights: int, flop_per_s: float
) -> dict[str, Any]:
    """Figures with the operations of the blocks' products; attention's own are left out."""
    flop = 2 * block_weights * rows
    return {
        "rows": rows,
        "product_flop": flop,
        "seconds": spread(seconds),
        "roofline_share": flop / min(seconds) / flop_per_s,
    }


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The one claim, its figure, and whether it is met; nothing is claimed of another shape."""
    target = LEAST_RATIO if result["shape"] == vars(SHAPE) else None
    text = "time of a pass for each variant over that of one pass for all"
    return [verdict(text, result["time_ratio"], target)]


def print_result(result: dict[str, Any]) -> None:
    columns = ("best", "p20", "p50", "p80")
    print(f"{'impl':14}{'rows':>9}" + "".join(f"{name + ', s':>10}" for name in columns), end="")
    print(f"{'roofline':>10}")
    for name, figures in result["impls"].items():
        times = "".join(f"{figures['seconds'][column]:>10.3f}" for column in columns)
        print(f"{name:14}{figures['rows']:>9,}{times}{figures['roofline_share']:>10.1%}")
    print(f"rows: {result['rows_ratio']:.1f} times as many, for {result['variants']} variants")
    print_verdicts(result["claims"])

"""Steerability: how far the answers to pairs follow a vector, as a curve with a slope.

Every vector is tried at its tap, one tap at a time, at several multipliers, on items that it was
not made from, and beside it a random vector of equal norm. `propensity.py` defines what is
measured, `slopes.py` the statistics of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.asked import add_vectors
from ..engine.fingerprint import model_fingerprint
from ..engine.not_finite import range_advice, refusal
from ..engine.tap_names import tap_name
from ..engine.vector_checks import check_move, check_unit
from ..engine.vectors import SteeringVectors
from ..model.arguments import choice, integer, numbers
from ..model.points import Layers
from ..model.transformer import Transformer
from ..parallel.agreement import asked_alike
from ..tokenizer.tokenizer import Tokenizer
from .extract import OnProgress
from .labels import PromptForm, checked_form, quoted
from .pairs import Pair, checked_pairs
from .prompts import PairIds, add_pairs, balance, encode_pairs, map_pairs
from .propensity import PROTOCOLS, Item, Variants, propensities
from .report import SteerabilityReport
from .slopes import MULTIPLIERS
from .suggest import Suggestion, suggest


@dataclass(frozen=True)
class Sweep:
    """The multipliers at which each vector is tried, and how its effect is measured.

    multipliers: at least two different numbers. protocol: one of PROTOCOLS. unit: what multiplier 1
    adds, the "vector", or a vector of the mean norm of the states there ("resid_norm"). seed: of
    the random vectors and of the bootstrap. Raises ValueError for anything else.
    """

    multipliers: Sequence[float] = MULTIPLIERS
    protocol: str = "paper"
    unit: str = "vector"
    seed: int = 0

    def __post_init__(self) -> None:
        steps = numbers(self.multipliers, "multipliers")
        if len(torch.tensor(steps, dtype=torch.float32).unique()) < 2:  # which edits are scaled in
            raise ValueError("a slope needs at least two different multipliers")
        checked: dict[str, Any] = {
            "multipliers": steps,
            "protocol": choice(self.protocol, "protocol", PROTOCOLS),
            "seed": integer(self.seed, "seed"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen, but still being constructed
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is not between 0 and 2^63 - 1")
        check_unit(self.unit)


def steerability(
    model: Transformer,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    vectors: SteeringVectors,
    *,
    multipliers: Sequence[float] = MULTIPLIERS,
    protocol: str = "paper",
    point: str | None = None,
    layers: Layers = "all",
    unit: str = "vector",
    form: PromptForm | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> SteerabilityReport:
    """Sweep taps and multipliers over the pairs; the same report on every rank.

    pairs: those whose keys the vectors name as their origin are left out. point, layers: which
    of the vectors to try, all of them by default. form: how a pair becomes text. multipliers,
    protocol, unit, seed: see `Sweep`. on_progress(pairs done, all) is called after each pair.

    Raises ValueError for vectors of another width or depth, pairs whose labels are not one token
    or whose text is too long, fewer than two multipliers, and where no pair is left.
    """
    sweep = Sweep(multipliers, protocol, unit, seed)
    if not isinstance(vectors, SteeringVectors):
        raise ValueError(f"vectors are of type {type(vectors).__name__}: give SteeringVectors")
    pairs, form = checked_pairs(pairs), checked_form(form)
    vectors.check(model.config)
    encoded = encode_pairs(tokenizer, pairs, form)
    return steerability_encoded(
        model, encoded, vectors.select(point, layers), sweep, on_progress=on_progress
    )


def steerability_encoded(
    model: Transformer,
    encoded: Sequence[PairIds],
    vectors: SteeringVectors,
    sweep: Sweep,
    *,
    suggestion: Suggestion | None = None,
    on_progress: OnProgress | None = None,
) -> SteerabilityReport:
    """`steerability` of all `vectors`, which must fit the model, on pairs with labels.

    suggestion: as made before; default that of the pairs that are measured.
    """
    with asked_alike(model.parallel) as asked:
        held_out = _held_out(encoded, vectors)
        items = map_pairs(held_out, lambda pair: Item.of(pair, sweep.protocol))
        if asked is not None:
            asked.add(sweep.multipliers, sweep.protocol, sweep.unit, sweep.seed, suggestion is None)
            add_pairs(asked, held_out)
            add_vectors(asked, vectors)
    variants = _variants(model, vectors, sweep)
    if suggestion is None:
        suggestion = suggest(model, held_out)
    found = _sweep(model, items, variants, on_progress)
    # [N, E] -> [vector or control, P, N, K]
    curves = found[:, :-1].view(len(items), 2, len(vectors.taps), len(sweep.multipliers))
    vector, control = curves.permute(1, 2, 0, 3).numpy()
    return SteerabilityReport(
        protocol=sweep.protocol,
        multipliers=list(sweep.multipliers),
        taps=list(vectors.taps),
        propensities=vector,
        control=control,
        baseline_accuracy=float((found[:, -1] > 0).double().mean()),
        balance=balance(held_out),
        form=", ".join(sorted({quoted(pair.form) for pair in held_out if pair.form is not None})),
        n_train=vectors.origin.n_pairs,
        unit=sweep.unit,
        accessibility=suggestion.accessibility,
        suggested=suggestion.tap,
        seed=sweep.seed,
        item_keys=tuple(pair.key for pair in held_out),
        warnings=_warnings(model, vectors, len(encoded) - len(held_out)),
    )


def _held_out(pairs: Sequence[PairIds], vectors: SteeringVectors) -> list[PairIds]:
    held_out = [pair for pair in pairs if pair.key not in vectors.origin.pair_keys]
    if not held_out:
        why = "the vectors were made from all of them" if pairs else "none is given"
        raise ValueError(f"no pair is left to measure on: {why}")
    return held_out


def _sweep(
    model: Transformer, items: Sequence[Item], variants: Variants, on_progress: OnProgress | None
) -> Tensor:
    """Propensities [N, E] float64. Raises ValueError where they are not finite."""
    found = torch.empty(len(items), len(variants.taps), dtype=torch.float64)
    for index, item in enumerate(items):
        found[index] = propensities(model, item, variants)
        if not found[index].isfinite().all():
            raise ValueError(_not_finite(model, variants, found[index], index + 1))
        if on_progress is not None:
            on_progress(index + 1, len(items))
    return found


def _not_finite(model: Transformer, variants: Variants, found: Tensor, number: int) -> str:
    """One line on propensities [E] of a pair that are not finite, for every rank.

    The last is that without an edit: if it alone were finite, the edits are to blame.
    """
    subject = f"the propensities of pair {number}"
    if not found[-1].isfinite():
        return refusal(model, subject)
    bad = int(found.isfinite().int().argmin())
    vector = variants.vectors[variants.rows[bad]].double().norm()
    move = abs(float(variants.scales[bad])) * float(vector)
    return (
        f"{subject} are not finite under the edit at {tap_name(variants.taps[bad])} of scale "
        f"{float(variants.scales[bad]):g}, which moves states by {move:.3g}: "
        f"choose smaller multipliers{range_advice(model)}"
    )


def _variants(model: Transformer, vectors: SteeringVectors, sweep: Sweep) -> Variants:
    """Vectors before controls, taps in their order, multipliers fastest; the last is no edit."""
    taps, control = list(vectors.taps), vectors.random_like(sweep.seed)
    table = torch.stack([held.at(tap) for held in (vectors, control) for tap in taps])
    factors = [vectors.unit_scale(tap, sweep.unit) for tap in taps]
    largest = max(map(abs, sweep.multipliers))
    for tap, factor in zip(taps, factors, strict=True):
        name = f"the edit at {tap_name(tap)}, multiplier {largest:g}"
        check_move(vectors.norm(tap) * factor * largest, name)
    scales = torch.tensor(factors * 2)[:, None] * torch.tensor(sweep.multipliers)
    rows = torch.arange(len(table)).repeat_interleave(len(sweep.multipliers))
    return Variants(
        taps=[*(tap for _ in range(2) for tap in taps for _ in sweep.multipliers), taps[0]],
        vectors=table.to(model.device, model.dtype),
        rows=F.pad(rows, (0, 1)).to(model.device),
        scales=F.pad(scales.flatten().float(), (0, 1)).to(model.device),
    )


def _warnings(model: Transformer, vectors: SteeringVectors, n_left_out: int) -> list[str]:
    warnings = []
    if n_left_out:
        warnings.append(f"{n_left_out} pairs that the vectors were made from are left out")
    other_model = vectors.warning(model_fingerprint(model))
    return warnings if other_model is None else [*warnings, other_model]

"""Steerability: how far the answers to pairs follow a vector, as a curve with a slope.

Every vector is tried at its own place, one place at a time, at several multipliers, on items that
it was not made from, and beside it a random vector of equal norm. See `propensity.py` for what is
measured, `slopes.py` for what becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.steering import Steering
from ..engine.vectors import SteeringVectors
from ..model.points import Layers
from ..model.transformer import Transformer
from ..tokenizer.spans import quoted
from ..tokenizer.tokenizer import Tokenizer
from .extract import OnProgress, model_fingerprint
from .pairs import Pair
from .prompts import PairIds, PromptForm, balance, encode_pairs, of_each
from .propensity import PROTOCOLS, Item, Variants, propensities
from .report import SteerabilityReport
from .slopes import MULTIPLIERS
from .suggest import suggest


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
    """Sweep places and multipliers over the pairs; the same report on every rank.

    pairs: those whose keys the vectors name as their origin are left out. point, layers: which
    of the vectors to try, all of them by default. unit: what multiplier 1 adds, the "vector" or
    as much as the states there are long on average ("resid_norm"). seed: of the random vectors
    and of the bootstrap. on_progress(pairs done, all) is called after each pair.

    Raises ValueError for vectors of another width or depth, pairs whose labels are not one token
    or whose text is too long, fewer than two multipliers, and where no pair is left.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol}: there are {', '.join(PROTOCOLS)}")
    steps = [float(m) for m in multipliers]
    if len(set(steps)) < 2 or not np.isfinite(steps).all():
        raise ValueError("a slope needs at least two different finite multipliers")
    vectors.check(model.config)
    vectors = _tried(vectors, layers, point)
    encoded = _held_out(encode_pairs(tokenizer, pairs, form or PromptForm()), vectors)
    items = of_each(encoded, lambda pair: Item.of(pair, protocol))
    variants = _variants(model, vectors, vectors.random_like(seed), steps, unit)
    accessibility, suggested = suggest(model, encoded)
    found = _sweep(model, items, variants, on_progress)
    # [N, E] -> [vector or control, P, N, K]
    curves = found[:, :-1].view(len(encoded), 2, len(vectors.taps), len(steps))
    vector, control = curves.permute(1, 2, 0, 3).numpy()
    return SteerabilityReport(
        protocol=protocol,
        multipliers=steps,
        taps=list(vectors.taps),
        propensities=vector,
        control=control,
        baseline_accuracy=float((found[:, -1] > 0).double().mean()),
        balance=balance(encoded),
        form=", ".join(sorted({quoted(pair.form) for pair in encoded if pair.form is not None})),
        n_train=vectors.origin.n_pairs,
        unit=unit,
        accessibility=accessibility,
        suggested=suggested,
        seed=seed,
        item_keys=tuple(pair.key for pair in encoded),
        warnings=_warnings(model, vectors, len(pairs) - len(encoded)),
    )


def _tried(vectors: SteeringVectors, layers: Layers, point: str | None) -> SteeringVectors:
    points = dict.fromkeys(tap.point for tap in vectors.taps) if point is None else (point,)
    return vectors.restricted(
        tap for name in points for tap in Steering(vectors, layers, name).taps(vectors.n_layers)
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
    """[N, E] float64"""
    found = torch.empty(len(items), len(variants.places), dtype=torch.float64)
    for number, item in enumerate(items):
        found[number] = propensities(model, item, variants)
        if on_progress is not None:
            on_progress(number + 1, len(items))
    return found


def _variants(
    model: Transformer,
    vectors: SteeringVectors,
    control: SteeringVectors,
    multipliers: Sequence[float],
    unit: str,
) -> Variants:
    """Vectors before controls, places in their order, multipliers fastest; at last no edit."""
    taps = list(vectors.taps)
    table = torch.stack([own.at(tap) for own in (vectors, control) for tap in taps])
    factors = [Steering(vectors, [tap.layer], tap.point, unit=unit).scale_at(tap) for tap in taps]
    scales = torch.tensor(factors * 2)[:, None] * torch.tensor(multipliers)
    rows = torch.arange(len(table)).repeat_interleave(len(multipliers))
    return Variants(
        places=[*(tap for _ in range(2) for tap in taps for _ in multipliers), taps[0]],
        vectors=table.to(model.device, model.dtype),
        rows=F.pad(rows, (0, 1)).to(model.device),
        scales=F.pad(scales.flatten().float(), (0, 1)).to(model.device),
    )


def _warnings(model: Transformer, vectors: SteeringVectors, n_left_out: int) -> list[str]:
    told = []
    if n_left_out:
        told.append(f"{n_left_out} pairs that the vectors were made from are left out")
    elsewhere = vectors.warning(model_fingerprint(model))
    return told if elsewhere is None else [*told, elsewhere]

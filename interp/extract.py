"""Steering vectors from pairs: how the states of matching answers differ from the others'.

Of pair i, at one place, h⁺_i is the state of the matching text and h⁻_i of the other, at the label
token, at the last token, or as the mean over the answer's tokens; D_i = h⁺_i - h⁻_i. The two may
also be one question after two texts that describe opposite characters (Chen et al. 2025, persona
vectors), compared at the token before the answer's label.

    mean_diff   v = mean_i D_i                                      (Rimsky et al. 2023, CAA)
    pca         v along the first right singular vector of D        (Zou et al. 2023)
    logistic    v along the weights that tell h⁺ from h⁻            (a linear probe)

The latter two are turned towards mean_diff and get the length of its component along them, so that
one unit of each moves a state by the mean gap along it.

All places come from one pass, in which the two answers are branches of one prompt. Residuals are
whole on every rank, so that ranks exchange what the forward pass exchanges, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..engine.branches import padded, run_branches, shared_prefix
from ..engine.files import require
from ..engine.vectors import METHODS, Origin, SteeringVectors, fingerprint
from ..model.norm import RMSNorm
from ..model.points import POINTS, Layers, Tap, check_point, parse_layers
from ..model.tap_sink import RowTaps
from ..model.transformer import Transformer
from ..tokenizer.tokenizer import Tokenizer
from .pairs import Pair
from .prompts import PairIds, PromptForm, Side, encode_pairs

AT = ("label", "last", "mean")
OnProgress = Callable[[int, int], None]


def extract(
    model: Transformer,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    point: str | Sequence[str] = "resid_post",
    layers: Layers = "all",
    method: str = "mean_diff",
    at: str = "label",
    contrast: tuple[str, str] | None = None,
    form: PromptForm | None = None,
    on_progress: OnProgress | None = None,
) -> SteeringVectors:
    """One vector for each layer and point, the same on every rank.

    point: one or several of POINTS. at: which state stands for an answer: that of its "label"
    token, of the "last" token, or the "mean" over the answer's. contrast: two texts, of which the
    first describes the matching behaviour; then questions are compared after the one and the
    other, and `at` and the answers do not count. form: how a pair becomes text; see `PromptForm`.
    on_progress(pairs done, all) is called after each pair.

    Raises ValueError naming the pair whose label is not one token, whose two sides give the same
    states, or whose text is longer than the context; and for unknown points, layers and methods.
    """
    points = [point] if isinstance(point, str) else point
    taps = taps_of(points, layers, model.config.n_layers)
    if method not in METHODS:
        raise ValueError(f"method {method}: there are {', '.join(METHODS)}")
    if at not in AT:
        raise ValueError(f"states at {at}: there are {', '.join(AT)}")
    if not pairs:
        raise ValueError("there is no pair to extract a vector from")
    if method == "logistic":  # asked before the passes, which may be long
        require("sklearn", "probe", "method logistic")
    at = at if contrast is None else "last"
    encoded = encode_pairs(
        tokenizer, pairs, form or PromptForm(), needs_label=at == "label", contrast=contrast
    )
    for number, pair in enumerate(encoded, start=1):
        n_tokens = max(len(side.ids) for side in (pair.matching, pair.other))
        check_length(model, n_tokens, f"pair {number}")
    gap = torch.zeros(len(taps), model.config.d, dtype=torch.float64)
    norms = torch.zeros(len(taps), dtype=torch.float64)
    # a fit needs every state, [2, N, P, d]; a mean does not, and at full width they are gigabytes
    n_kept = 0 if method == "mean_diff" else len(encoded)
    kept = torch.zeros(2, n_kept, len(taps), model.config.d)
    for number, pair in enumerate(encoded):
        sides = pair_states(model, pair, taps, at).cpu()
        _check_differs(sides, number + 1, at)
        gap += (sides[0] - sides[1]) / len(encoded)
        norms += sides.norm(dim=-1).mean(0) / len(encoded)
        if n_kept:
            kept[:, number] = sides
        if on_progress is not None:
            on_progress(number + 1, len(encoded))
    directions = [_direction(gap[p], kept[:, :, p], method) for p in range(len(taps))]
    return SteeringVectors(
        vectors=dict(zip(taps, directions, strict=True)),
        resid_norms=dict(zip(taps, norms.tolist(), strict=True)),
        n_layers=model.config.n_layers,
        origin=Origin(
            model=model_fingerprint(model),
            method=method,
            positions=at if contrast is None else "contrast",
            n_pairs=len(encoded),
            pair_keys=tuple(pair.key for pair in encoded),
        ),
    )


def model_fingerprint(model: Transformer) -> str:
    """From the norms' weights, which every rank holds whole."""
    norms: list[Tensor] = [m.weight for m in model.modules() if isinstance(m, RMSNorm)]
    # in bfloat16, so that a model is the same in whichever dtype it is loaded
    return fingerprint(model.config, torch.cat(norms).bfloat16().float().cpu())


def taps_of(points: Sequence[str], layers: Layers, n_layers: int) -> list[Tap]:
    """The places of points and layers. ValueError for what does not exist or has two names."""
    for name in points:
        check_point(name)
    if not points:
        raise ValueError("no point is given")
    numbers = parse_layers(layers, n_layers)
    taps = [Tap(layer, name) for layer in numbers for name in POINTS if name in points]
    if len({tap.canonical for tap in taps}) < len(taps):
        raise ValueError("resid_post of a layer is resid_pre of the next: give one of the two")
    return taps


@torch.no_grad()
def pair_states(model: Transformer, pair: PairIds, taps: Sequence[Tap], at: str) -> Tensor:
    """States of both sides [2, P, d], the matching one first; float64 means of the model's own.

    The answers are branches of the prompt as far as they share it and nothing is read of it.
    """
    sides = (pair.matching, pair.other)
    spans = [_span(side, at) for side in sides]
    n_shared = min(pair.n_shared, *(span.start for span in spans))
    n_own = max(span.stop for span in spans) - n_shared
    # nothing is read after the answers
    ids = padded([side.ids[n_shared : n_shared + n_own] for side in sides], model.device)
    rows = [
        torch.arange(span.start - n_shared, span.stop - n_shared) + row * n_own
        for row, span in enumerate(spans)
    ]
    capture = RowTaps(taps, torch.cat(rows).to(model.device), model.config.d, dtype=model.dtype)
    cache = shared_prefix(model, sides[0].ids[:n_shared])
    run_branches(model, cache, ids.to(model.device), sink=capture)
    by_side = capture.states.split([len(own) for own in rows])
    return torch.stack([states.double().mean(0) for states in by_side])


def _span(side: Side, at: str) -> range:
    """The positions whose states stand for the side."""
    if at == "mean":
        return range(side.answer_at, len(side.ids))
    place = len(side.ids) - 1 if at == "last" else side.label_at
    assert place is not None
    return range(place, place + 1)


def check_length(model: Transformer, n_tokens: int, name: str = "a pair") -> None:
    if n_tokens > model.config.context:
        raise ValueError(
            f"{name} has {n_tokens} tokens, more than the context of {model.config.context}"
        )


def _check_differs(sides: Tensor, number: int, at: str) -> None:
    """sides [2, P, d]"""
    if torch.equal(sides[0], sides[1]):
        why = {
            "label": "the model does not tell the two labels apart",
            "last": "the last tokens are the same, and no place read depends on those before them",
            "mean": "the answers are the same for the model",
        }[at]
        raise ValueError(f"pair {number} has the same state on both sides: {why}")


def _direction(gap: Tensor, sides: Tensor, method: str) -> Tensor:
    """Mean gap [d] and, for what is fitted, sides [2, N, d] of one place -> [d] float32."""
    if method == "mean_diff":
        return gap.float()
    along = _first_component(sides) if method == "pca" else _probe(sides)
    return (along * (gap @ along)).float()  # the product turns it, too


def _first_component(sides: Tensor) -> Tensor:
    """The unit vector [d] along which the gaps are largest, from the smaller of D Dᵀ and DᵀD."""
    gaps = (sides[0] - sides[1]).double()
    n, d = gaps.shape
    if n < d:
        along = gaps.T @ torch.linalg.eigh(gaps @ gaps.T).eigenvectors[:, -1]
    else:
        along = torch.linalg.eigh(gaps.T @ gaps).eigenvectors[:, -1]
    return _unit(along)


def _probe(sides: Tensor) -> Tensor:
    """Unit weights [d] of a logistic regression on the states, scaled to a mean length of 1."""
    from sklearn.linear_model import LogisticRegression

    states = sides.double().flatten(0, 1)
    states = states / states.norm(dim=-1).mean()
    is_matching = torch.arange(2).repeat_interleave(sides.shape[1]) == 0
    # small gaps give small gradients from the start on: the usual tolerance would stop there
    probe = LogisticRegression(tol=1e-8, max_iter=1000).fit(states.numpy(), is_matching.numpy())
    return _unit(torch.from_numpy(probe.coef_[0]))


def _unit(x: Tensor) -> Tensor:
    """Zeros stay zeros: where no state differs, that is what there is to report."""
    length = x.norm()
    return x / length if length > 0 else x

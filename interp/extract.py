"""Steering vectors from pairs: how the states of matching answers differ from the others'.

Of pair i, at one tap, h⁺_i is the state of the matching text and h⁻_i of the other, at the label
token, at the last token, or as the mean over the answer's tokens, but never at position 0, the
attention sink; D_i = h⁺_i - h⁻_i. The two may
also be one question after two texts that describe opposite characters (Chen et al. 2025, persona
vectors), compared at the token before the answer's label.

    mean_diff   v = mean_i D_i                                      (Rimsky et al. 2023, CAA)
    pca         v along the first right singular vector of D        (Zou et al. 2023)
    logistic    v along the weights that tell h⁺ from h⁻            (a linear probe)

The latter two are turned towards mean_diff and get the length of its component along them, so that
one unit of each moves a state by the mean gap along it.

All taps come from one pass, in which the two answers are branches of one prompt. Residuals are
whole on every rank, so that ranks exchange what the forward pass exchanges, and a digest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.files import require
from ..engine.fingerprint import model_fingerprint
from ..engine.not_finite import on_all_ranks, refusal
from ..engine.tap_names import tap_name
from ..engine.vector_fields import Origin
from ..engine.vectors import SteeringVectors
from ..model.arguments import all_of, choice, choices, integers
from ..model.points import POINTS, Layers, Tap, parse_layers
from ..model.transformer import Transformer
from ..parallel.agreement import asked_alike
from ..tokenizer.tokenizer import Tokenizer
from .directions import METHODS, direction
from .labels import PromptForm, checked_form
from .pair_states import read_span, side_states
from .pairs import Pair, checked_pairs
from .prompts import PairIds, add_pairs, check_length, encode_pairs, map_pairs
from .state_norms import StateNorms, TokenText

AT = ("label", "last", "mean")
OnProgress = Callable[[int, int], None]
OnWarning = Callable[[str], None]


@dataclass(frozen=True)
class Extraction:
    """How vectors are made from pairs: the states to compare, and the method.

    point: one or several of POINTS. layers: as in `LensSpec`. method: one of METHODS. at: the state
    that represents an answer: that of its "label" token, of the "last" token, or the "mean" over
    the answer's tokens. contrast: two texts, of which the first describes the matching behaviour;
    then questions are compared after the one and the other, and `at` and the answers are unused.

    Raises ValueError for unknown points, methods and states, for a state that is named twice, and
    where the package that a method needs is missing.
    """

    point: str | Sequence[str] = "resid_post"
    layers: Layers = "all"
    method: str = "mean_diff"
    at: str = "label"
    contrast: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "point": tuple(choices(self.point, "point", POINTS)),
            "method": choice(self.method, "method", METHODS),
            "at": choice(self.at, "states at", AT),
        }
        if not isinstance(self.layers, str):
            checked["layers"] = tuple(integers(self.layers, "layers"))
        if self.contrast is not None:
            checked["contrast"] = _two_texts(self.contrast)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen, but still being constructed
        if self.method == "logistic":  # checked before the passes, which may be long
            require("sklearn", "probe", "method logistic")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(self.point)  # __post_init__ made it a tuple

    @property
    def read_at(self) -> str:
        """`at`; "last" for a contrast, whose sides have no answer and end where they are read."""
        return self.at if self.contrast is None else "last"

    def taps(self, n_layers: int) -> list[Tap]:
        """The taps that get a vector. Raises ValueError for layers that do not exist."""
        layers = parse_layers(self.layers, n_layers)
        taps = [Tap(layer, name) for layer in layers for name in POINTS if name in self.points]
        if len({tap.canonical for tap in taps}) < len(taps):
            raise ValueError("resid_post of a layer is resid_pre of the next: give one of the two")
        return taps

    def encode(
        self, tokenizer: Tokenizer, pairs: Sequence[Pair], form: PromptForm
    ) -> list[PairIds]:
        """The pairs as `extract_encoded` takes them. Raises ValueError as `encode_pairs` does."""
        needs_label = self.read_at == "label"
        return encode_pairs(tokenizer, pairs, form, needs_label=needs_label, contrast=self.contrast)


def _two_texts(value: Any) -> tuple[str, str]:
    texts = all_of(value, str, "contrast", "two texts")
    if len(texts) != 2 or not all(texts):
        raise ValueError(f"contrast has {len(texts)} texts: give two, neither of them empty")
    return texts[0], texts[1]


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

    form: how a pair becomes text. on_progress(pairs done, all) is called after each pair. The
    others are those of `Extraction`.

    Raises ValueError naming the pair whose label is not one token, whose two sides give the same
    states, states that are not finite, or a text that is longer than the context, or has no more
    than position 0 to read; and as `Extraction` does. Warns of a state whose norm is over ten times
    the median of those read at its tap.
    """
    extraction = Extraction(point, layers, method, at, contrast)
    pairs, form = checked_pairs(pairs), checked_form(form)
    extraction.taps(model.config.n_layers)  # refused before the pairs are
    encoded = extraction.encode(tokenizer, pairs, form)
    return extract_encoded(
        model,
        encoded,
        extraction,
        text_of=tokenizer.token_text,
        on_progress=on_progress,
        on_warning=partial(warnings.warn, stacklevel=3),
    )


def extract_encoded(
    model: Transformer,
    encoded: Sequence[PairIds],
    extraction: Extraction,
    *,
    text_of: TokenText = str,
    on_progress: OnProgress | None = None,
    on_warning: OnWarning = warnings.warn,
) -> SteeringVectors:
    """`extract` from pairs that `extraction.encode` made.

    on_warning(line) is called on rank 0 where the norm of a state stands out; text_of(id) names its
    token there.
    """
    with asked_alike(model.parallel) as asked:
        taps, at = extraction.taps(model.config.n_layers), extraction.read_at
        if not encoded:
            raise ValueError("there is no pair to extract a vector from")
        for number, pair in enumerate(encoded, start=1):
            check_length(max(len(side.ids) for side in pair.sides), model.config, f"pair {number}")
        map_pairs(encoded, lambda pair: [read_span(side, at) for side in pair.sides])
        if asked is not None:
            asked.add(taps, at, extraction.method)
            add_pairs(asked, encoded)
    gap, norms, kept = _read(
        model, encoded, taps, at, keeps=extraction.method != "mean_diff", on_progress=on_progress
    )
    warning = norms.warning(encoded, at, text_of)
    if warning is not None and model.parallel.rank == 0:
        on_warning(warning)
    vectors = [direction(gap[p], kept[:, :, p], extraction.method) for p in range(len(taps))]
    return SteeringVectors(
        vectors=dict(zip(taps, vectors, strict=True)),
        resid_norms=dict(zip(taps, norms.means(), strict=True)),
        n_layers=model.config.n_layers,
        origin=Origin(
            model=model_fingerprint(model),
            method=extraction.method,
            positions=at if extraction.contrast is None else "contrast",
            n_pairs=len(encoded),
            pair_keys=tuple(pair.key for pair in encoded),
        ),
    )


def _read(
    model: Transformer,
    encoded: Sequence[PairIds],
    taps: Sequence[Tap],
    at: str,
    *,
    keeps: bool,
    on_progress: OnProgress | None,
) -> tuple[Tensor, StateNorms, Tensor]:
    """Mean gap [P, d] float64 and all norms; with `keeps` also the states [2, N, P, d].

    A fit needs every state; a mean does not, and at full width they are gigabytes.
    """
    n, d = len(encoded), model.config.d
    gap = torch.zeros(len(taps), d, dtype=torch.float64)
    norms = StateNorms(taps)
    kept = torch.zeros(2, n if keeps else 0, len(taps), d)
    for index, pair in enumerate(encoded):
        states = side_states(model, pair, taps, at)
        sides = torch.stack([side.double().mean(0) for side in states]).cpu()
        is_finite = sides.isfinite().all(-1).all(0)  # [P]
        if not on_all_ranks(bool(is_finite.all()), model):
            tap = taps[int(is_finite.int().argmin())]
            raise ValueError(refusal(model, f"the states of pair {index + 1} at {tap_name(tap)}"))
        _check_differs(sides, index + 1, at)
        gap += (sides[0] - sides[1]) / n
        norms.add(index, states)
        if keeps:
            kept[:, index] = sides
        if on_progress is not None:
            on_progress(index + 1, n)
    return gap, norms, kept


def _check_differs(sides: Tensor, number: int, at: str) -> None:
    """Raise ValueError where both sides [2, P, d] are the same."""
    if torch.equal(sides[0], sides[1]):
        why = {
            "label": "the model does not tell the two labels apart",
            "last": "the last tokens are the same, and no tap read depends on those before them",
            "mean": "the answers are the same for the model",
        }[at]
        raise ValueError(f"pair {number} has the same state on both sides: {why}")

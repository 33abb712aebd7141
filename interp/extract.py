"""Steering vectors from pairs: how the states of matching answers differ from the others'.

Of pair i, at one tap, h⁺_i is the state of the matching text and h⁻_i of the other, at the label
token, at the last token, or as the mean over the answer's tokens; D_i = h⁺_i - h⁻_i. The two may
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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.branches import padded, run_branches, shared_prefix
from ..engine.files import require
from ..engine.fingerprint import model_fingerprint
from ..engine.vector_fields import Origin
from ..engine.vectors import SteeringVectors
from ..model.arguments import all_of, choice, choices, integers
from ..model.points import POINTS, Layers, Tap, parse_layers
from ..model.tap_sink import RowTaps
from ..model.transformer import Transformer
from ..parallel.agreement import asked_alike
from ..tokenizer.tokenizer import Tokenizer
from .directions import METHODS, direction
from .labels import PromptForm, checked_form
from .pairs import Pair, checked_pairs
from .prompts import PairIds, Side, add_pairs, check_length, encode_pairs

AT = ("label", "last", "mean")
OnProgress = Callable[[int, int], None]


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
    states, or whose text is longer than the context; and as `Extraction` does.
    """
    extraction = Extraction(point, layers, method, at, contrast)
    pairs, form = checked_pairs(pairs), checked_form(form)
    extraction.taps(model.config.n_layers)  # refused before the pairs are
    encoded = extraction.encode(tokenizer, pairs, form)
    return extract_encoded(model, encoded, extraction, on_progress=on_progress)


def extract_encoded(
    model: Transformer,
    encoded: Sequence[PairIds],
    extraction: Extraction,
    *,
    on_progress: OnProgress | None = None,
) -> SteeringVectors:
    """`extract` from pairs that `extraction.encode` made."""
    with asked_alike(model.parallel) as asked:
        taps, at = extraction.taps(model.config.n_layers), extraction.read_at
        if not encoded:
            raise ValueError("there is no pair to extract a vector from")
        for number, pair in enumerate(encoded, start=1):
            check_length(max(len(side.ids) for side in pair.sides), model.config, f"pair {number}")
        if asked is not None:
            asked.add(taps, at, extraction.method)
            add_pairs(asked, encoded)
    gap, norms, kept = _read(
        model, encoded, taps, at, keeps=extraction.method != "mean_diff", on_progress=on_progress
    )
    vectors = [direction(gap[p], kept[:, :, p], extraction.method) for p in range(len(taps))]
    return SteeringVectors(
        vectors=dict(zip(taps, vectors, strict=True)),
        resid_norms=dict(zip(taps, norms.tolist(), strict=True)),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean gap [P, d] and mean norm [P], float64; with `keeps` also the states [2, N, P, d].

    A fit needs every state; a mean does not, and at full width they are gigabytes.
    """
    n, d = len(encoded), model.config.d
    gap = torch.zeros(len(taps), d, dtype=torch.float64)
    norms = torch.zeros(len(taps), dtype=torch.float64)
    kept = torch.zeros(2, n if keeps else 0, len(taps), d)
    for index, pair in enumerate(encoded):
        sides = pair_states(model, pair, taps, at).cpu()
        _check_differs(sides, index + 1, at)
        gap += (sides[0] - sides[1]) / n
        norms += sides.norm(dim=-1).mean(0) / n
        if keeps:
            kept[:, index] = sides
        if on_progress is not None:
            on_progress(index + 1, n)
    return gap, norms, kept


@torch.no_grad()
def pair_states(model: Transformer, pair: PairIds, taps: Sequence[Tap], at: str) -> Tensor:
    """States of both sides [2, P, d], the matching side first; float64 means of the model's states.

    The answers are branches of their shared prompt, or of its part before the first state read.
    """
    sides = pair.sides
    spans = [_span(side, at) for side in sides]
    n_shared = min(pair.n_shared, *(span.start for span in spans))
    stop = max(span.stop for span in spans)  # nothing is read after it
    ids = padded([side.ids[n_shared:stop] for side in sides], model.device)
    rows = [
        torch.arange(span.start - n_shared, span.stop - n_shared) + branch * ids.shape[1]
        for branch, span in enumerate(spans)
    ]
    capture = RowTaps(taps, torch.cat(rows).to(model.device), model.config.d, dtype=model.dtype)
    cache = shared_prefix(model, sides[0].ids[:n_shared])
    run_branches(model, cache, ids, sink=capture)
    by_side = capture.states.split([len(part) for part in rows])
    return torch.stack([states.double().mean(0) for states in by_side])


def _span(side: Side, at: str) -> range:
    """The positions whose states represent the side; at: one of AT."""
    if at == "mean":
        return range(side.answer_at, len(side.ids))
    position = len(side.ids) - 1 if at == "last" else side.label_at
    assert position is not None
    return range(position, position + 1)


def _check_differs(sides: Tensor, number: int, at: str) -> None:
    """Raise ValueError where both sides [2, P, d] are the same."""
    if torch.equal(sides[0], sides[1]):
        why = {
            "label": "the model does not tell the two labels apart",
            "last": "the last tokens are the same, and no tap read depends on those before them",
            "mean": "the answers are the same for the model",
        }[at]
        raise ValueError(f"pair {number} has the same state on both sides: {why}")

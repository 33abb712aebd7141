"""Steering vectors by place: checked, looked up, combined, compared, and controls for them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.points import POINTS, Layers, Tap, check_point, parse_layers

METHODS = ("mean_diff", "pca", "logistic")

# Less than this share of a vector's norm is what rounding to float32 leaves, not a direction.
LEAST_SHARE = 1e-6

# What of a config decides which function the weights are: a fingerprint depends on these.
SIZES = tuple("architecture vocab_size d n_layers n_heads n_kv_heads head_dim ffn_size".split())


@dataclass(frozen=True)
class Origin:
    """Where vectors come from. Strings and numbers only, so that it can be written as JSON."""

    model: str = ""  # its fingerprint; of two models, both with a + between
    method: str = ""  # one of METHODS, or what made them: "gguf", "sum", "random", ...
    positions: str = ""  # whose states they were made from: "label", "last", "mean"
    n_pairs: int = 0
    pair_keys: tuple[str, ...] = ()  # 16 hex digits each, of the pairs they were made from

    def joined(self, other: Origin, method: str) -> Origin:
        """Of what is made from both: it has seen the pairs of either."""
        keys = tuple(dict.fromkeys((*self.pair_keys, *other.pair_keys)))
        models = dict.fromkeys(part for part in (self.model, other.model) if part)
        return Origin(
            model="+".join(models),
            method=method,
            positions=self.positions,
            n_pairs=len(keys) or self.n_pairs + other.n_pairs,
            pair_keys=keys,
        )


@dataclass(eq=False)
class SteeringVectors:
    """One vector a tap, all of the same width d, for a model of `n_layers` blocks.

    vectors: [d] each; they are copied, to float32 on the CPU. resid_norms: mean L2 norm of the
    states at that tap when the vectors were made, for scales in units of it; taps may be missing.
    A tap is found by its place: Tap(3, "resid_pre") finds what was put at Tap(2, "resid_post").

    Raises ValueError for no vectors, for vectors that are not flat, of one width, finite and
    other than zero, for taps that do not exist in such a model, and for two vectors at one place.
    """

    vectors: dict[Tap, Tensor]
    resid_norms: dict[Tap, float]
    n_layers: int
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("there are no steering vectors")
        given = {Tap(*tap): vector for tap, vector in self.vectors.items()}
        taps = sorted(given, key=lambda tap: _order(tap, self.n_layers))
        self.vectors = {tap: _own_copy(given[tap]) for tap in taps}
        self._own_names = {tap.canonical: tap for tap in self.vectors}
        if len(self._own_names) < len(self.vectors):
            twice = next(tap for tap in self.vectors if self._own_names[tap.canonical] != tap)
            raise ValueError(f"two vectors stand at one place, {tap_name(twice)}")
        for tap, vector in self.vectors.items():
            _check_vector(tap, vector, self.d)
        self.resid_norms = self._checked_norms()

    def _checked_norms(self) -> dict[Tap, float]:
        norms = {}
        for tap, norm in self.resid_norms.items():
            own = self._own_names.get(Tap(*tap).canonical)
            if own is None:
                raise ValueError(f"a norm of the states is given at {tap_name(tap)}, but no vector")
            if not (math.isfinite(norm) and norm > 0):
                raise ValueError(f"the norm of the states at {tap_name(tap)} is {norm}")
            norms[own] = float(norm)
        return {tap: norms[tap] for tap in self.vectors if tap in norms}

    @property
    def taps(self) -> tuple[Tap, ...]:
        """By layer, then in the order of POINTS."""
        return tuple(self.vectors)

    @property
    def d(self) -> int:
        return next(iter(self.vectors.values())).numel()

    def _find(self, tap: Tap) -> Tap:
        own = self._own_names.get(Tap(*tap).canonical)
        if own is None:
            raise ValueError(f"no vector at {tap_name(tap)}: there are {listed(self.taps)}")
        return own

    def at(self, tap: Tap) -> Tensor:
        """[d] float32. Raises ValueError where there is no vector, saying where there are."""
        return self.vectors[self._find(tap)]

    def norm(self, tap: Tap) -> float:
        """L2 norm of the vector."""
        return float(self.at(tap).double().norm())

    def resid_norm(self, tap: Tap) -> float:
        """Mean L2 norm of the model's states there. Raises ValueError where it is not known."""
        norm = self.resid_norms.get(self._find(tap))
        if norm is None:
            raise ValueError(
                f"the vectors come without the norm of the states at {tap_name(tap)}: "
                "give scales in units of the vector"
            )
        return norm

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for a model of another width or depth."""
        if self.d != config.d:
            raise ValueError(
                f"the steering vectors have {self.d} numbers, the states of this model {config.d}"
            )
        if self.n_layers != config.n_layers:
            raise ValueError(
                f"the steering vectors are for a model of {self.n_layers} layers, "
                f"this one has {config.n_layers}"
            )

    def warning(self, model_fingerprint: str) -> str | None:
        """One line if the vectors were made on another model; None if not, or not known."""
        if self.origin.model in ("", model_fingerprint):
            return None
        return (
            f"the steering vectors were made on another model ({self.origin.model}; "
            f"this one is {model_fingerprint}): their effect may differ"
        )

    def scaled(self, factor: float) -> SteeringVectors:
        """Every vector times `factor`. Raises ValueError if that is zero or not finite."""
        if factor == 0 or not math.isfinite(factor):
            raise ValueError(f"steering vectors cannot be scaled by {factor}")
        return self._changed("scaled", lambda _, vector: vector * factor)

    def __mul__(self, factor: Real | float) -> SteeringVectors:
        return self.scaled(float(factor)) if isinstance(factor, Real) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVectors:
        return self.scaled(-1)

    def __add__(self, other: SteeringVectors) -> SteeringVectors:
        """Place by place. Raises ValueError naming the first that only one side has."""
        if not isinstance(other, SteeringVectors):
            return NotImplemented
        return self._plus(other, 1, "sum")

    def __sub__(self, other: SteeringVectors) -> SteeringVectors:
        if not isinstance(other, SteeringVectors):
            return NotImplemented
        return self._plus(other, -1, "difference")

    def _plus(self, other: SteeringVectors, sign: int, method: str) -> SteeringVectors:
        self._check_same_places(other)
        return self._changed(method, lambda tap, own: own + sign * other.at(tap).double(), other)

    def orthogonalized(self, against: SteeringVectors) -> SteeringVectors:
        """Each vector without its component along that of `against` at the same place.

        Raises ValueError where `against` has no vector, and where nothing is left.
        """
        self._check_same_model(against)

        def rejected(tap: Tap, vector: Tensor) -> Tensor:
            along = against.at(tap).double()
            rest = vector - along * (vector @ along / (along @ along))
            if rest.norm() <= LEAST_SHARE * vector.norm():
                raise ValueError(
                    f"nothing is left of the vector at {tap_name(tap)}: both point along one line"
                )
            return rest

        return self._changed("orthogonalized", rejected, against)

    def normalized(self) -> SteeringVectors:
        """The same directions at unit length."""
        return self._changed("normalized", lambda _, vector: vector / vector.norm())

    def random_like(self, seed: int) -> SteeringVectors:
        """A control: random directions, each of the norm of the vector that it stands for.

        The same for the same seed and number of taps; the global generator is left alone.
        """
        generator = torch.Generator().manual_seed(seed)

        def drawn(_: Tap, vector: Tensor) -> Tensor:
            direction = torch.randn(self.d, dtype=torch.float64, generator=generator)
            return direction * (vector.norm() / direction.norm())

        return self._changed("random", drawn)

    def restricted(self, taps: Iterable[Tap]) -> SteeringVectors:
        """Those at `taps` alone. Raises ValueError for one that has no vector."""
        kept = {self._find(tap) for tap in taps}
        return dataclasses.replace(
            self,
            vectors={tap: vector for tap, vector in self.vectors.items() if tap in kept},
            resid_norms={tap: norm for tap, norm in self.resid_norms.items() if tap in kept},
        )

    def of_layers(self, layers: Layers) -> SteeringVectors:
        """Those of some layers alone, written as everywhere ("1-3,8,-1", or numbers).

        Raises ValueError for a layer that has no vector; "all" means those that have one.
        """
        if layers == "all":
            return self.restricted(self.taps)
        wanted = parse_layers(layers, self.n_layers)
        held = {tap.layer for tap in self.taps}
        for layer in wanted:
            if layer not in held:
                raise ValueError(f"no vector at layer {layer}: there are {listed(self.taps)}")
        return self.restricted(tap for tap in self.taps if tap.layer in wanted)

    def cosines(self, other: SteeringVectors | None = None) -> tuple[tuple[Tap, ...], Tensor]:
        """The taps, and [P, P'] float32: cosine of each vector to each of `other` (or its own).

        Rows follow the taps returned, which are these vectors' own; columns follow other.taps.
        Raises ValueError for vectors of another width.
        """
        other = self if other is None else other
        self._check_same_width(other)
        rows, columns = self._unit_rows(), other._unit_rows()
        return self.taps, (rows @ columns.T).clamp(-1, 1).float()

    def _unit_rows(self) -> Tensor:
        rows = torch.stack(list(self.vectors.values())).double()  # [P, d]
        return rows / rows.norm(dim=1, keepdim=True)

    def _changed(
        self,
        method: str,
        change: Callable[[Tap, Tensor], Tensor],
        other: SteeringVectors | None = None,
    ) -> SteeringVectors:
        """The same taps and norms with other vectors; `change` works in float64, rounded once."""
        return dataclasses.replace(
            self,
            vectors={tap: change(tap, vector.double()) for tap, vector in self.vectors.items()},
            origin=dataclasses.replace(self.origin, method=method)
            if other is None
            else self.origin.joined(other.origin, method),
        )

    def _check_same_width(self, other: SteeringVectors) -> None:
        if self.d != other.d:
            raise ValueError(
                f"steering vectors of {self.d} and of {other.d} numbers do not go together"
            )

    def _check_same_model(self, other: SteeringVectors) -> None:
        self._check_same_width(other)
        if self.n_layers != other.n_layers:
            raise ValueError(
                f"steering vectors for models of {self.n_layers} and of {other.n_layers} layers "
                "do not go together"
            )

    def _check_same_places(self, other: SteeringVectors) -> None:
        self._check_same_model(other)
        for tap in sorted((*self.taps, *other.taps), key=lambda tap: _order(tap, self.n_layers)):
            if (tap.canonical in self._own_names) != (tap.canonical in other._own_names):
                raise ValueError(
                    f"only one side has a vector at {tap_name(tap)}: restrict both to the same taps"
                )

    def save(self, path: str | Path) -> None:
        """Write to .safetensors or .gguf, by the ending, or nothing at all.

        Raises ValueError for another ending, for what gguf cannot hold (see vector_files.py), and
        where the package that it needs is missing.
        """
        from .vector_files import save_vectors

        save_vectors(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig | None = None) -> SteeringVectors:
        """Read what `save` wrote, or a gguf control vector of other tools.

        Such a gguf may not say how deep its model is: give that model's config. Raises ValueError
        naming the file if it is broken, or if its vectors do not fit `config`.
        """
        from .vector_files import load_vectors

        return load_vectors(Path(path), config)


def fingerprint(config: ModelConfig, probe: Tensor) -> str:
    """16 hex digits that tell models apart.

    probe: a small float32 tensor that the caller takes from the weights, the same part each time.
    They depend on the architecture's name and sizes (SIZES) and on the probe's bytes: any change of
    those numbers, rounding to another dtype included, gives another fingerprint. Weights outside
    the probe do not count, nor do device and, if the caller gathers the probe, the rank count.
    """
    sizes = json.dumps({name: getattr(config, name) for name in SIZES})
    numbers = probe.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4")
    return hashlib.sha256(sizes.encode() + numbers.tobytes()).hexdigest()[:16]


def tap_name(tap: Tap) -> str:
    layer, point = tap
    return f"{point} of layer {layer}"


def listed(taps: Iterable[Tap]) -> str:
    """Taps for people: "resid_post of layers 1-3, 5; mlp_out of layers 2"."""
    layers: dict[str, list[int]] = {}
    for layer, point in taps:
        layers.setdefault(point, []).append(layer)
    return "; ".join(f"{point} of layers {_ranges(own)}" for point, own in layers.items())


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 -> "1-3, 5"."""
    parts = []
    # consecutive numbers share their distance to a count
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        own = [number for _, number in run]
        parts.append(f"{own[0]}-{own[-1]}" if len(own) > 1 else str(own[0]))
    return ", ".join(parts)


def _order(tap: Tap, n_layers: int) -> tuple[int, int]:
    """Where a tap stands among all. Raises ValueError for one that does not exist."""
    check_point(tap.point)
    if not 0 <= tap.layer < n_layers:
        raise ValueError(
            f"layer {tap.layer} does not exist: the model has layers 0 to {n_layers - 1}"
        )
    return tap.layer, POINTS.index(tap.point)


def _own_copy(vector: Tensor) -> Tensor:
    plain = vector.detach().to("cpu", torch.float32)
    return plain.clone(memory_format=torch.contiguous_format)


def _check_vector(tap: Tap, vector: Tensor, d: int) -> None:
    name = f"the steering vector at {tap_name(tap)}"
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {list(vector.shape)}: it needs one dim")
    if vector.numel() != d:
        raise ValueError(f"{name} has {vector.numel()} numbers, the first one {d}")
    if not vector.isfinite().all():
        raise ValueError(f"{name} is not finite")
    if not vector.any():
        raise ValueError(f"{name} is all zeros: it has no direction")

"""Steering vectors by tap: checked, looked up, combined, compared, and controls for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from ..model.arguments import integer, number
from ..model.config import ModelConfig
from ..model.points import POINTS, Layers, Tap, check_point, parse_layers
from ..model.summary import counted, named
from ..tokenizer.paths import user_path
from .tap_names import listed, tap_name, tap_order
from .vector_checks import by_tap, check_direction, check_unit, check_width
from .vector_fields import UNKNOWN_ORIGIN, Origin, VectorFields
from .vector_files import naming_file, read_fields, write_fields


@dataclass(eq=False)
class SteeringVectors:
    """A vector for each of some taps, all of the same width d, for a model of `n_layers` blocks.

    vectors: [d] each; they are copied, to float32 on the CPU. resid_norms: mean L2 norm of the
    states at that tap when the vectors were made, for scales in units of it; taps may be missing.
    The two names of a state find one vector: Tap(3, "resid_pre") is Tap(2, "resid_post").

    Raises ValueError for no vectors, for vectors that are not flat, of one width, finite and
    other than zero, for taps that do not exist in such a model, and for two vectors for one tap.
    """

    vectors: dict[Tap, Tensor]
    resid_norms: dict[Tap, float]
    n_layers: int
    origin: Origin = UNKNOWN_ORIGIN

    def __repr__(self) -> str:
        size = f"d {self.d}, for {counted(self.n_layers, 'layer')}"
        method = [self.origin.method] if self.origin.method else []
        return named(self, listed(self.taps), size, *method)

    def __post_init__(self) -> None:
        given = by_tap(self.vectors, "the steering vectors")
        if not given:
            raise ValueError("there are no steering vectors")
        for tap, vector in given.items():
            if not isinstance(vector, Tensor):
                kind = type(vector).__name__
                raise ValueError(f"the steering vector at {tap_name(tap)} is a {kind}, no tensor")
        self.n_layers = integer(self.n_layers, "n_layers")
        taps = sorted(given, key=lambda tap: tap_order(tap, self.n_layers))
        self.vectors = {tap: _copy(given[tap]) for tap in taps}
        self._by_canonical = {tap.canonical: tap for tap in self.vectors}
        if len(self._by_canonical) < len(self.vectors):
            twice = next(t for t in self.vectors if self._by_canonical[t.canonical] != t)
            raise ValueError(f"there are two vectors for one tap, {tap_name(twice)}")
        for tap, vector in self.vectors.items():
            name = f"the steering vector at {tap_name(tap)}"
            if vector.ndim == 1 and vector.numel() != self.d:
                raise ValueError(f"{name} has {vector.numel()} numbers, the first one {self.d}")
            check_direction(vector, name)
        self.resid_norms = self._checked_norms()

    def _checked_norms(self) -> dict[Tap, float]:
        norms = {}
        for tap, norm in by_tap(self.resid_norms, "the norms of the states").items():
            held = self._by_canonical.get(tap.canonical)
            if held is None:
                raise ValueError(f"a norm of the states is given at {tap_name(tap)}, but no vector")
            norms[held] = number(norm, f"the norm of the states at {tap_name(tap)}")
            if norms[held] <= 0:
                raise ValueError(f"the norm of the states at {tap_name(tap)} is {norm}")
        return {tap: norms[tap] for tap in self.vectors if tap in norms}

    @property
    def taps(self) -> tuple[Tap, ...]:
        """By layer, then in the order of POINTS."""
        return tuple(self.vectors)

    @property
    def points(self) -> list[str]:
        """The points that have a vector, in the order of POINTS."""
        held = {tap.point for tap in self.vectors}
        return [point for point in POINTS if point in held]

    @property
    def d(self) -> int:
        """Width of the vectors."""
        return next(iter(self.vectors.values())).numel()

    def _find(self, tap: Tap) -> Tap:
        held = self._by_canonical.get(Tap(*tap).canonical)
        if held is None:
            raise ValueError(f"no vector at {tap_name(tap)}: there are {listed(self.taps)}")
        return held

    def at(self, tap: Tap) -> Tensor:
        """[d] float32. Raises ValueError where there is no vector, saying where there are."""
        return self.vectors[self._find(tap)]

    def norm(self, tap: Tap) -> float:
        """L2 norm of the vector at a tap."""
        return float(self.at(tap).double().norm())

    def resid_norm(self, tap: Tap) -> float:
        """Mean L2 norm of the model's states at a tap. Raises ValueError where it is not known."""
        norm = self.resid_norms.get(self._find(tap))
        if norm is None:
            raise ValueError(
                f"the vectors come without the norm of the states at {tap_name(tap)}: "
                "give scales in units of the vector"
            )
        return norm

    def unit_scale(self, tap: Tap, unit: str) -> float:
        """The factor that makes the vector at a tap as long as one `unit` (one of UNITS) there.

        "vector": 1. "resid_norm": the mean norm of the states over that of the vector. Raises
        ValueError where that is not known, and for another unit.
        """
        check_unit(unit)
        return 1.0 if unit == "vector" else self.resid_norm(tap) / self.norm(tap)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for a model of another width or depth."""
        check_width("the steering vectors have", self.d, config)
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

    def taps_at(self, point: str, layers: Layers = "all") -> list[Tap]:
        """The taps of some layers at a point, in order; "all" layers are those with a vector.

        Raises ValueError for a layer, or a point, that has no vector.
        """
        check_point(point)
        held = [tap.layer for tap in self.taps if tap.point == point]
        if not held:
            raise ValueError(
                f"the steering vectors have none at {point}: they have {', '.join(self.points)}"
            )
        is_all = isinstance(layers, str) and layers == "all"
        wanted = held if is_all else parse_layers(layers, self.n_layers)
        missing = [layer for layer in wanted if layer not in held]
        if missing:
            raise ValueError(
                f"the steering vectors have none at layer {missing[0]}, {point}: "
                f"they have layers {', '.join(map(str, held))}"
            )
        return [Tap(layer, point) for layer in wanted]

    def select(self, point: str | None = None, layers: Layers = "all") -> SteeringVectors:
        """The vectors of some layers at one point, or at every point that has any.

        Raises ValueError as `taps_at` does.
        """
        points = self.points if point is None else [point]
        return self.restricted(tap for name in points for tap in self.taps_at(name, layers))

    def restricted(self, taps: Iterable[Tap]) -> SteeringVectors:
        """The vectors at `taps` alone. Raises ValueError for one that has no vector."""
        kept = {self._find(tap) for tap in taps}
        return dataclasses.replace(
            self,
            vectors={tap: vector for tap, vector in self.vectors.items() if tap in kept},
            resid_norms={tap: norm for tap, norm in self.resid_norms.items() if tap in kept},
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
        """Tap by tap. Raises ValueError naming the first that only one side has."""
        if not isinstance(other, SteeringVectors):
            return NotImplemented
        return self._plus(other, 1, "sum")

    def __sub__(self, other: SteeringVectors) -> SteeringVectors:
        if not isinstance(other, SteeringVectors):
            return NotImplemented
        return self._plus(other, -1, "difference")

    def _plus(self, other: SteeringVectors, sign: int, method: str) -> SteeringVectors:
        self._check_same_taps(other)
        return self._changed(method, lambda tap, v: v + sign * other.at(tap).double(), other)

    def random_like(self, seed: int) -> SteeringVectors:
        """A control: random directions, each with the norm of the vector that it replaces.

        The same for the same seed and number of taps; the global generator is left alone.
        """
        generator = torch.Generator().manual_seed(seed)

        def drawn(_: Tap, vector: Tensor) -> Tensor:
            direction = torch.randn(self.d, dtype=torch.float64, generator=generator)
            return direction * (vector.norm() / direction.norm())

        return self._changed("random", drawn)

    def cosines(self, other: SteeringVectors | None = None) -> tuple[tuple[Tap, ...], Tensor]:
        """The taps, and [P, P'] float32: cosine of each vector to each of `other`.

        Without `other`, of each vector to each. Rows follow the taps returned, those of these
        vectors; columns follow other.taps. Raises ValueError for vectors of another width.
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

    def _check_same_taps(self, other: SteeringVectors) -> None:
        self._check_same_width(other)
        if self.n_layers != other.n_layers:
            raise ValueError(
                f"steering vectors for models of {self.n_layers} and of {other.n_layers} layers "
                "do not go together"
            )
        both = sorted((*self.taps, *other.taps), key=lambda tap: tap_order(tap, self.n_layers))
        for tap in both:
            if (tap.canonical in self._by_canonical) != (tap.canonical in other._by_canonical):
                raise ValueError(
                    f"only one side has a vector at {tap_name(tap)}: restrict both to the same taps"
                )

    def save(self, path: str | Path) -> None:
        """Write to .safetensors or .gguf, by the ending, or nothing at all.

        Raises ValueError for another ending, for what gguf cannot hold (see vector_files.py), and
        where the package that it needs is missing.
        """
        fields = VectorFields(self.vectors, self.resid_norms, self.n_layers, self.origin)
        write_fields(fields, Path(path))

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig | None = None) -> SteeringVectors:
        """Read what `save` wrote, or a gguf control vector of other tools.

        Such a gguf may not say how deep its model is: give that model's config. Raises ValueError
        naming the file if it is broken, or if its vectors do not fit `config`.
        """
        path = user_path(path)
        fields = read_fields(path, None if config is None else config.n_layers)
        with naming_file(path):
            vectors = cls(*fields)
            if config is not None:
                vectors.check(config)
        return vectors


def _copy(vector: Tensor) -> Tensor:
    plain = vector.detach().to("cpu", torch.float32)
    return plain.clone(memory_format=torch.contiguous_format)

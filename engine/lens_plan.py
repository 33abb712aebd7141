"""The states that the steps of a batch read: those of all its lenses together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..model.config import ModelConfig
from ..model.points import POINTS, Tap
from .lens_spec import LensSpec

TargetKind = Literal["none", "fixed", "next"]


@dataclass(frozen=True)
class LensPlan:
    """The taps that are read at a position, of which the last is the final layer's, and top-k.

    KL is measured from the final layer, which is read beside the taps that are asked for. target:
    "next" if some request asks for the token that follows, which is known a step later; "fixed" if
    all targets are known beforehand. deferred: whether states of many steps are decoded together.
    """

    taps: tuple[Tap, ...]
    top_k: int
    target: TargetKind
    deferred: bool = False

    @classmethod
    def of(cls, specs: Sequence[LensSpec], config: ModelConfig) -> LensPlan:
        """One plan for several lenses, of which there is at least one."""
        wanted = {tap for spec in specs for tap in spec.taps(config)}
        final = Tap(config.n_layers - 1, "resid_post")
        taps = sorted(wanted | {final}, key=lambda tap: (tap.layer, POINTS.index(tap.point)))
        targets = {spec.targets for spec in specs}
        return cls(
            taps=tuple(taps),
            top_k=max(spec.top_k for spec in specs),
            target="next" if "next" in targets else "none" if targets == {None} else "fixed",
            deferred=all(spec.mode == "deferred" for spec in specs),
        )

"""The edits that one forward pass makes, by tap."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..kernels.edits import Edits
from .points import Tap


class TapEdits:
    """The edits of one forward pass, by canonical tap. The default is none anywhere."""

    def __init__(self, by_tap: Mapping[Tap, tuple[Edits, ...]] | None = None) -> None:
        self._by_tap = by_tap or {}

    def at(self, tap: Tap) -> tuple[Edits, ...]:
        """The edits at a tap, one per pass over the state, to be applied in this order."""
        return self._by_tap.get(tap, ())

    def then(self, later: TapEdits) -> TapEdits:
        """These edits, and after them those of another at each tap."""
        taps = dict.fromkeys((*self._by_tap, *later._by_tap))
        return TapEdits({tap: self.at(tap) + later.at(tap) for tap in taps})


NO_EDITS = TapEdits()

# absolute positions [B, T] of a pass's tokens -> the edits of its B * T rows
EditFn = Callable[[Tensor], TapEdits]

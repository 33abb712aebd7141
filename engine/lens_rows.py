"""The lens of states that were stored, and the rows that are kept of a text."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.points import Tap
from ..model.transformer import Transformer
from ..parallel.head_reduce import reduce_head
from .lens_plan import LensPlan
from .lens_spec import LensSpec
from .limits import DECODED_POSITIONS
from .record import best_candidates, pack_rows

KEPT_PIECES = 64  # that are joined into one block


def read_states(
    model: Transformer, plan: LensPlan, states: Tensor, targets: Tensor | None
) -> Tensor:
    """The head's statistics of states [N, P, d] at the plan's taps: packed [N, P, width] int32.

    targets [N] int64: the id whose log-prob and rank are reported at each of the N positions, -1
    for none. Positions are decoded in blocks, which share one reading of the head's weight. Nothing
    waits for results on the host.
    """
    n_taps, d = states.shape[1:]
    packed = []
    for start in range(0, states.shape[0], DECODED_POSITIONS):
        block = states[start : start + DECODED_POSITIONS]
        block_targets = None if targets is None else targets[start : start + DECODED_POSITIONS]
        result = reduce_head(
            model.norm(block.reshape(-1, d)),
            model.head,
            k=plan.top_k,
            target_ids=None if block_targets is None else block_targets.repeat_interleave(n_taps),
            rows_per_request=n_taps,
        )
        packed.append(pack_rows(result, plan.top_k).unflatten(0, (-1, n_taps)))
    return torch.cat(packed)


# (newly read positions, their targets, packed rows [T, P, width])
OnRows = Callable[[list[int], list[int], Tensor], None]


class LensRecord:
    """The rows that a lens read of one text, in order of position.

    taps: those that the lens asks for. Rows are kept packed, which takes less memory than their
    fields, and in blocks, which take less than pieces. With on_rows they are handed over instead.
    """

    def __init__(self, spec: LensSpec, config: ModelConfig) -> None:
        self.spec, self.taps = spec, spec.taps(config)
        self.plan = LensPlan.of([spec], config)
        self.positions, self.targets = array("q"), array("q")
        self.on_rows: OnRows | None = None
        self._blocks: list[Tensor] = []  # [n, P, width]
        self._recent: list[Tensor] = []

    @property
    def reads_steps(self) -> bool:
        """Whether positions from the prompt's last one on are wanted."""
        return self.spec.positions in ("all", "generated")

    def wants(self, position: int, prompt_length: int) -> bool:
        """Whether a position of the prompt is wanted."""
        if self.spec.positions in ("generated", "last"):
            return position == prompt_length - 1
        return True

    @property
    def fixed_target(self) -> int:
        """The same target for all positions; -1 where it is the next token, or none."""
        return self.spec.targets if isinstance(self.spec.targets, int) else -1

    def target(self, following: int) -> int:
        """The target at a position that is followed by the token `following`, -1 for none."""
        return following if self.spec.targets == "next" else self.fixed_target

    def chosen(self, plan: LensPlan, rows: Tensor) -> Tensor:
        """The rows that this lens asks for, of [n, taps of the plan, width]."""
        return best_candidates(rows[:, _columns(plan, self.taps)], self.spec.top_k)

    def add(self, positions: list[int], targets: list[int], rows: Tensor) -> None:
        """Take in `chosen` rows of n positions."""
        if self.on_rows is not None:
            self.on_rows(positions, targets, rows)
            return
        self.positions.extend(positions)
        self.targets.extend(targets)
        self._recent.append(rows)
        if len(self._recent) == KEPT_PIECES:
            self._blocks.append(torch.cat(self._recent))
            self._recent = []

    def rows(self) -> Tensor | None:
        """[T, P, width] int32; None where nothing was read."""
        pieces: Sequence[Tensor] = [*self._blocks, *self._recent]
        return torch.cat(list(pieces)) if pieces else None


@lru_cache
def _columns(plan: LensPlan, taps: tuple[Tap, ...]) -> list[int]:
    """The indices of taps among those of a plan; cached, as every token asks for them."""
    return [plan.taps.index(tap) for tap in taps]

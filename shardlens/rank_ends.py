"""The rank at fault when ranks end, and the exit code of the run."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from .cli import INTERRUPTED, LOST_CONTACT, REFUSED, UNWRITTEN


@dataclass
class Ending:
    """How ranks ended by themselves: codes in the order of their ends, and those that did not."""

    codes: dict[int, int] = field(default_factory=dict)  # by rank; below 0: minus a signal
    running: list[int] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        bad = set(self.codes.values()) - {0}
        if not bad and not self.running:
            return 0
        if bad & {INTERRUPTED, -signal.SIGINT}:
            return INTERRUPTED
        return REFUSED if REFUSED in bad <= {REFUSED, LOST_CONTACT} else 1

    def line(self) -> str | None:
        """A line on what went wrong; None where nothing did, or where a rank has said it."""
        bad = {rank: code for rank, code in self.codes.items() if code}
        for rank, code in bad.items():
            if code in (INTERRUPTED, -signal.SIGINT):
                return f"rank {rank} was interrupted"
        by_signal = [(rank, -code) for rank, code in bad.items() if code < 0]
        if by_signal:
            # a rank that loses contact may abort: any other signal is nearer to the cause
            rank, number = min(by_signal, key=lambda killed: killed[1] == signal.SIGABRT)
            return f"rank {rank} was killed by {signal.Signals(number).name}"
        if self.stopped:
            return f"rank {self.stopped[0]} is stopped and does not answer the others"
        for rank, code in bad.items():
            if code not in (REFUSED, LOST_CONTACT, UNWRITTEN):
                return f"rank {rank} ended with exit code {code}"
        if UNWRITTEN in bad.values():
            return None
        refused = [rank for rank, code in bad.items() if code == REFUSED]
        if refused:
            return None if 0 in refused else f"rank {refused[0]} refused what rank 0 did not"
        if self.running:
            return f"rank {self.running[0]} does not answer the others"
        return "the ranks lost contact with each other" if bad else None

"""The rank that a launcher names, and its exit code."""

from __future__ import annotations

import pytest

from shardlens.rank_ends import Ending


@pytest.mark.parametrize(
    "ending, code, said",
    [
        (Ending({0: 0, 1: 0}), 0, None),
        (Ending({0: 3, 1: -9}), 1, "rank 1 was killed by SIGKILL"),
        (Ending({0: -6, 1: -11}), 1, "rank 1 was killed by SIGSEGV"),  # an abort comes of it
        (Ending({1: -6, 0: -6}), 1, "rank 1 was killed by SIGABRT"),
        (Ending({0: 3}, [1], [1]), 1, "rank 1 is stopped and does not answer the others"),
        (Ending({0: 3}, [1]), 1, "rank 1 does not answer the others"),
        (Ending({0: 3, 1: 3}), 1, "the ranks lost contact with each other"),
        (Ending({0: 3, 1: -2}), 130, "rank 1 was interrupted"),
        (Ending({0: 2, 1: 3}), 2, None),
        (Ending({0: 4, 1: 0}), 1, None),  # a full disk, which the rank has said
        (Ending({0: 2, 1: -9}), 1, "rank 1 was killed by SIGKILL"),
        (Ending({1: 2, 0: 3}), 2, "rank 1 refused what rank 0 did not"),
    ],
)
def test_the_line_names_the_rank_at_fault(ending: Ending, code: int, said: str | None) -> None:
    assert (ending.exit_code, ending.line()) == (code, said)

"""Ranks that do the same: what each is asked for is compared, and long waits are allowed for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import distributed_c10d

from .collectives import exchange
from .digest import DIGEST_BYTES, Digest
from .group import TensorParallel

LOADING_S = 1800.0  # that ranks wait for one that downloads or reads a model
_REFUSED = bytes(DIGEST_BYTES)  # sent by a rank that goes no further
_DUE = "every rank must make the same calls with the same arguments"


@contextmanager
def asked_alike(parallel: TensorParallel) -> Iterator[Digest | None]:
    """Check what a call asks for in the block, add it to the digest, and go on if ranks agree.

    After the block each rank sends DIGEST_BYTES, which are not counted as traffic. Raises
    ValueError on every rank, naming the ranks that differ from rank 0, or those that refused in the
    block what others did not. A process alone has no digest: None.
    """
    if parallel.size == 1:
        yield None
        return
    asked = Digest()
    try:
        yield asked
    except Exception:
        exchange(_REFUSED, parallel)
        raise
    seen = exchange(asked.digest(), parallel)
    refused = [rank for rank, digest in enumerate(seen) if digest == _REFUSED]
    if refused:
        raise ValueError(f"{_named(refused)} refused what others accept: {_DUE}")
    differ = [rank for rank, digest in enumerate(seen) if digest != seen[0]]
    if differ:
        verb = "differs" if len(differ) == 1 else "differ"
        raise ValueError(f"{_named(differ)} {verb} from rank 0 in texts or settings: {_DUE}")


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


@contextmanager
def waiting_long(parallel: TensorParallel) -> Iterator[None]:
    """For a block in which ranks wait for one that downloads or reads files: LOADING_S at least.

    A group that was there before shardlens keeps the timeout that it has.
    """
    if parallel.group is None or parallel.timeout_s is None:
        yield
        return
    longer_s = max(LOADING_S, parallel.timeout_s)
    distributed_c10d._set_pg_timeout(timedelta(seconds=longer_s), parallel.group)
    try:
        yield
    finally:
        distributed_c10d._set_pg_timeout(timedelta(seconds=parallel.timeout_s), parallel.group)

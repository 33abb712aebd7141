"""The ranks that share one model, and a count of the bytes they exchange."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

# Where a launcher says by which init_method of torch.distributed its ranks find each other.
RENDEZVOUS = "SHARDLENS_RENDEZVOUS"
TIMEOUT_S = 60.0  # that a rank waits for the others in a collective
MOST_TIMEOUT_S = 7 * 86_400.0


@dataclass
class Traffic:
    """Bytes this rank sent, by collective: `sent_bytes["all_gather"]`, and how many calls."""

    sent_bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, collective: str, sent_bytes: int) -> None:
        self.sent_bytes[collective] = self.sent_bytes.get(collective, 0) + sent_bytes
        self.calls[collective] = self.calls.get(collective, 0) + 1

    def copy(self) -> Traffic:
        return Traffic(dict(self.sent_bytes), dict(self.calls))

    def since(self, before: Traffic) -> Traffic:
        """The difference to `before`, an earlier copy."""
        return Traffic(
            {name: n - before.sent_bytes.get(name, 0) for name, n in self.sent_bytes.items()},
            {name: n - before.calls.get(name, 0) for name, n in self.calls.items()},
        )

    def add_all(self, other: Traffic) -> None:
        for name, calls in other.calls.items():
            self.calls[name] = self.calls.get(name, 0) + calls
            self.sent_bytes[name] = self.sent_bytes.get(name, 0) + other.sent_bytes[name]

    @property
    def total_bytes(self) -> int:
        return sum(self.sent_bytes.values())

    def reset(self) -> None:
        self.sent_bytes.clear()
        self.calls.clear()


@dataclass(frozen=True)
class TensorParallel:
    """A rank among the `size` ranks that hold slices of the same weights.

    `group` is None for a single process, which then needs no process group at all. A copied model
    (copy.deepcopy, for a moving average of the weights) talks to the same ranks: it shares this
    object with the original, and `traffic` counts the bytes of both. `timeout_s` is that of a group
    which `from_env` initialised, and None for a group that was there before.
    """

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)
    timeout_s: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is outside a group of {self.size} ranks")
        if self.size > 1 and self.group is None:
            raise ValueError(f"{self.size} ranks need a process group")

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallel:
        return self

    @classmethod
    def single(cls) -> TensorParallel:
        return cls()

    @classmethod
    def from_group(cls, group: ProcessGroup | None = None) -> TensorParallel:
        """All ranks of `group` (default: the default group, which must be initialised)."""
        group = group if group is not None else dist.group.WORLD
        if group is None:
            raise ValueError("torch.distributed is not initialised; use TensorParallel.from_env()")
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, axis: str = "tp") -> TensorParallel:
        """The ranks along `axis` of a DeviceMesh, for use inside a larger training job."""
        return cls.from_group(mesh.get_group(axis))

    @classmethod
    def from_env(
        cls, device: str | torch.device | None = None, timeout_s: float = TIMEOUT_S
    ) -> TensorParallel:
        """The ranks that a launcher started (RANK, WORLD_SIZE, LOCAL_RANK), or a single process.

        Initialises torch.distributed unless it is: NCCL for CUDA devices, gloo for the CPU.
        `device` defaults to CUDA where there is one. timeout_s: how long a rank waits for the
        others, when they meet and in each collective, before it gives up. Raises ValueError for a
        timeout that is not above 0, or above a week.
        """
        if not 0 < timeout_s <= MOST_TIMEOUT_S:
            raise ValueError(
                f"a timeout of {timeout_s} seconds: give a number above 0, at most {MOST_TIMEOUT_S}"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls.single()
        if dist.is_initialized():
            return cls.from_group()
        options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
        if RENDEZVOUS in os.environ:
            options["init_method"] = os.environ[RENDEZVOUS]
            options["rank"] = int(os.environ["RANK"])
            options["world_size"] = int(os.environ["WORLD_SIZE"])
        kind = torch.device(device).type if device is not None else default_device_type()
        if kind == "cuda":
            local_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(local_device)
            dist.init_process_group("nccl", device_id=local_device, **options)
        else:
            dist.init_process_group("gloo", **options)
        return replace(cls.from_group(), timeout_s=timeout_s)


# The axes of a mesh over which something is split, parts in the order of ranks, those of the last
# axis being neighbours. No axis at all stands for a single rank.
Axes = tuple[TensorParallel, ...]


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, or did not answer in time."""
    if not isinstance(error, RuntimeError):
        return False
    # gloo raises plain RuntimeErrors, which carry the path of its source
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def default_device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

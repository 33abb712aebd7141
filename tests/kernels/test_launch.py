"""Choice of configurations and how the head is cut: for chips that are not there, by counts."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardlens.bench.models import MODELS
from shardlens.kernels import (
    Chip,
    Target,
    decode_attention,
    head_cut,
    head_stats,
    implementation,
    launch,
    pretending,
)
from shardlens.kernels.launch import Config, choose, fewest_parts

module = import_module("shardlens.kernels.head_stats")  # the package gives the function that name
H100, A10, A100, B200, RTX_5090 = (
    Chip(90, 132), Chip(86, 72), Chip(80, 108), Chip(100, 148), Chip(120, 170)
)  # fmt: skip
CHIPS = (H100, A10, A100, B200, RTX_5090)


class Machine:
    """A host and a device with separate clocks, instead of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host_us: float, most_sleep: float) -> None:
        self.host_us, self.most_sleep = host_us, most_sleep
        self.host = self.device = 0.0
        self.launched = 0
        machine = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.time_us = 0.0

            def record(self) -> None:
                machine.enqueue(0.0)
                self.time_us = machine.device

            def query(self) -> bool:
                return machine.host >= self.time_us

            def synchronize(self) -> None:
                machine.host = max(machine.host, self.time_us)

            def elapsed_time(self, other: Any) -> float:
                return (other.time_us - self.time_us) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(launch, "_chosen", {})

    def enqueue(self, device_us: float) -> None:
        self.device = max(self.device, self.host) + device_us

    def sleep(self, cycles: int) -> None:
        self.enqueue(min(self.most_sleep, cycles / 1e3))

    def run(self, host_us: float, device_us: float) -> None:
        """A launcher that prepares for a while on the host, then launches."""
        self.launched += 1
        self.host += self.host_us * host_us
        self.enqueue(device_us)


def chosen(monkeypatch: pytest.MonkeyPatch, host_us: float, most_sleep: float = 1e9) -> Any:
    """The choice of two configurations: fast to prepare and slow to run, and the reverse."""
    machine = Machine(monkeypatch, host_us, most_sleep)
    costs = {Config((1,), 4): (1.0, 20.0), Config((2,), 4): (6.0, 15.0)}
    device = torch.device("cuda")
    found = choose("key", device, list(costs), lambda config: machine.run(*costs[config]))
    launched = machine.launched
    assert choose("key", device, list(costs), lambda config: machine.run(*costs[config])) == found
    assert machine.launched == launched  # the choice is kept
    return found


@pytest.mark.parametrize("host_us", [0.0, 1.0, 100.0, 50_000.0])
def test_the_choice_does_not_depend_on_the_host(
    host_us: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(monkeypatch, host_us).tile == (2,)


def test_where_every_launch_blocks_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleep cannot hide the host: there is nothing to choose by, and it is not tried for ever."""
    assert chosen(monkeypatch, 1e5, most_sleep=1.0).tile == (1,)


def test_limits_are_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, minor, multi_processor_count = 9, 9, 7
        shared_memory_per_block_optin = 50_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    chip = launch._cuda_chip.__wrapped__(torch.device("cuda"))
    assert chip == Chip(99, 7, 50_000)
    assert chip.resident(50_001) == 0 and chip.resident(50_000) == 1
    assert chip.resident(20_000) == 2 and chip.resident(24_600) == 1  # with what is reserved
    assert Chip(86, 72).shared_bytes == 99 * 1024 < Chip(90, 132).shared_bytes
    assert Chip(777, 1).shared_bytes == 99 * 1024  # a chip that nobody has heard of


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm_{chip.capability}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_configuration_fits_its_chip(chip: Chip, dtype: torch.dtype) -> None:
    for n_rows in (1, 17, 33, 65, 129, 8192):
        for bulk in {False, chip.has_wide_products}:
            for config in head_cut.configs_of(n_rows, dtype, chip, bulk):
                assert chip.resident(head_cut.program_bytes(config, dtype)) >= 1
                assert bulk or not config.tile[4]


@pytest.mark.parametrize("tiles, expected", [(32, 4), (64, 2), (128, 1), (33, 4), (40, 13)])
def test_parts_fill_the_processors(tiles: int, expected: int) -> None:
    """On 132 processors, within 1/32 of the best."""
    assert fewest_parts(tiles, 132, 132, head_cut.GOOD_FILL) == expected


class Allocations(TorchDispatchMode):
    """Sums the bytes of new tensors."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.full):
            self.n_bytes += out.nbytes
        return out


def head_bytes(chip: Chip, n_rows: int, n_ids: int, d: int = 4096, k: int = 5) -> int:
    """Bytes that `head_stats` allocates on a chip, results included."""
    x, weight = (torch.empty(n, d, dtype=torch.bfloat16, device="meta") for n in (n_rows, n_ids))
    first = patch.object(module, "choose", lambda key, device, configs, run: configs[0])
    with implementation("triton"), pretending(chip, lambda *_: None), first, Allocations() as seen:
        head_stats(x, weight, k=k)
    work = head_cut.cut(n_rows, n_ids, 1, k, x.dtype, chip, chip.has_wide_products)
    expected = head_cut.extra_bytes(n_rows, work.shares, work.programs, k, work.configs[0])
    assert seen.n_bytes == expected
    return seen.n_bytes


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm_{chip.capability}")
@pytest.mark.parametrize("vocab", sorted({model.vocab for model in MODELS.values()}))
def test_many_rows_take_less_than_a_hundredth_of_logits(chip: Chip, vocab: int) -> None:
    """From 4,096 rows on, whatever their number; a slice of the vocabulary has its own bytes."""
    for n_rows in (4096, 4224, 4352, 5000, 6144, 8192, 8576, 12_800, 16_256, 16_384, 33_000):
        share = head_bytes(chip, n_rows, vocab) / (2 * n_rows * vocab)
        assert share < 0.01, (n_rows, share)


@pytest.mark.parametrize(
    "n_rows, n_ids, most_mib",
    [
        (1, 128_256, 2.2),
        (16, 128_256, 2.4),
        (33, 128_256, 9),
        (64, 151_936, 10),
        (4096, 16_032, 10),
    ],
)
def test_bytes_of_few_rows_and_of_slices(n_rows: int, n_ids: int, most_mib: float) -> None:
    """A tile per program that runs, which no number of rows shrinks; on an H100."""
    assert head_bytes(H100, n_rows, n_ids) <= most_mib * 2**20


def test_the_processors_are_busy_where_memory_allows() -> None:
    """At least nine tenths of what runs is work, for most numbers of rows; never below 3/4."""
    fills = []
    for n_rows in range(4096, 40_000, 256):
        work = head_cut.cut(n_rows, 128_256, 1, 5, torch.bfloat16, H100, True)
        fills.append(work.pieces / (-(-work.pieces // work.programs) * work.programs))
    assert min(fills) > 0.75 and sum(fill > 0.9 for fill in fills) > 0.95 * len(fills)


def launches(chip: Chip, batch: int, capacity: int, span: int) -> list[tuple[Any, ...]]:
    """The launches of decode attention: kernel, and what decides how its sums are cut."""
    seen: list[tuple[Any, ...]] = []

    def note(kernel: Any, arguments: Any, options: dict[str, Any]) -> None:
        shapes = tuple(tuple(x.shape) for x in arguments if isinstance(x, Tensor))
        seen.append((kernel.fn.__name__, shapes, tuple(options.items())))

    q = torch.empty(batch, 32, 128, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(batch, 8, capacity, 128, dtype=torch.bfloat16, device="meta")
    lengths = torch.empty(batch, dtype=torch.int64, device="meta")
    with implementation("triton"), pretending(chip, note):
        decode_attention(q, cache, cache, lengths, span=span)
    return seen


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm_{chip.capability}")
def test_attention_is_cut_by_its_shapes_alone(chip: Chip) -> None:
    """One configuration, never timed; eager steps, whose span grows, and captured ones agree."""
    whole = launches(chip, 4, 2048, 2048)
    assert [name for name, *_ in whole] == ["_split_kernel", "_merge_kernel"]
    for span in (1, 130, 700, 2047):
        assert launches(chip, 4, 2048, span) == whole
    assert launches(chip, 1, 2048, 2048) != whole


def test_head_target_ids_do_not_move_the_cut() -> None:
    """With targets and without, rows are cut alike, so that logits have the same bits."""
    grids = []
    for with_target in (False, True):
        target = None
        if with_target:
            floats = [torch.empty(33, device="meta") for _ in range(2)]
            target = Target(torch.empty(33, dtype=torch.int64, device="meta"), *floats)
        seen: list[Any] = []

        def note(kernel: Any, arguments: Any, options: Any, seen: list[Any] = seen) -> None:
            seen.append(
                (kernel.fn.__name__, [x for x in arguments if isinstance(x, int)], options["K"])
            )

        x, weight = (
            torch.empty(n, 512, dtype=torch.bfloat16, device="meta") for n in (33, 128_256)
        )
        with implementation("triton"), pretending(H100, note):
            head_stats(x, weight, k=5, target=target)
        grids.append(seen)
    assert grids[0] == grids[1]

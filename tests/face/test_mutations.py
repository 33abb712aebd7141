"""Files of a model changed at random: each runs rightly or is refused in one line with exit 2.

A fuzz of what strangers may publish: types, nulls, huge and negative numbers, nesting, cuts, lies.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shardlens.cli import main
from shardlens.model import DEMO

SECONDS = 20
MEMORY_BYTES = 2 * 2**30
NUMBERS: list[Any] = [True, -1, 0, 1, 1.5, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf")]
VALUES = [*NUMBERS, None, "", "x", "\x1b[2J", "../x", [], [1], {}, {"a": 1}, [[]], "9" * 400]


def mutate(chance: random.Random, value: Any) -> Any:
    """`value` with one of its parts replaced, dropped, doubled or nested."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        kind = chance.random()
        if kind < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.25:
            return value | {f"{key}_": value[key]}
        return value | {key: mutate(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.7:
        index = chance.randrange(len(value))
        return [*value[:index], mutate(chance, value[index]), *value[index + 1 :]]
    return chance.choice(VALUES)


def mutate_json(chance: random.Random, path: Path) -> None:
    kind = chance.random()
    text = path.read_text(encoding="utf-8")
    if kind < 0.05:
        path.write_text(text[: chance.randrange(len(text))], encoding="utf-8")
    elif kind < 0.08:
        path.write_text("[" * 100_000, encoding="utf-8")
    else:
        path.write_text(json.dumps(mutate(chance, json.loads(text))), encoding="utf-8")


def mutate_header(chance: random.Random, path: Path) -> None:
    """The header of a safetensors file, or bytes anywhere in its first part, or its end."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    kind = chance.random()
    if kind < 0.6:
        header = json.dumps(mutate(chance, json.loads(data[8 : 8 + length]))).encode()
        data = bytearray(struct.pack("<Q", len(header))) + header + data[8 + length :]
    elif kind < 0.8:
        data = data[: chance.randrange(len(data))]
    else:
        for at in (chance.randrange(8 + length) for _ in range(3)):
            data[at] = chance.randrange(256)
    path.write_bytes(data)


def with_index(folder: Path) -> None:
    """One shard under an index."""
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    data = (folder / shard).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    names = [name for name in json.loads(data[8 : 8 + length]) if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    config["chat_template"] = [{"name": "default", "template": "{{ messages[0].content }}"}]
    config["added_tokens_decoder"] = {str(t["id"]): t for t in added}
    path.write_text(json.dumps(config))


Mutation = Callable[[random.Random, Path], None]
KINDS: dict[str, tuple[str, Mutation, Callable[[Path], None] | None]] = {
    "config": ("config.json", mutate_json, None),
    "generation config": ("generation_config.json", mutate_json, None),
    "tokenizer": ("tokenizer.json", mutate_json, None),
    "tokenizer config": ("tokenizer_config.json", mutate_json, with_template),
    "index": ("model.safetensors.index.json", mutate_json, with_index),
    "header": ("model.safetensors", mutate_header, None),
}


@contextmanager
def limits() -> Iterator[None]:
    """An alarm after SECONDS, and no more memory than MEMORY_BYTES above what is held."""

    def too_slow(*_: Any) -> None:
        raise AssertionError(f"over {SECONDS} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def try_files(kind: str, seeds: range, folder: Path, capsys: Any) -> tuple[int, int]:
    """(runs, refusals) of `lens` on mutated copies of the packaged model."""
    name, change, prepare = KINDS[kind]
    counts = [0, 0]
    for seed in seeds:
        copy = shutil.copytree(DEMO, folder / str(seed))
        if prepare is not None:
            prepare(copy)
        change(random.Random(f"{kind} {seed}"), copy / name)
        with limits():
            code = main(["lens", str(copy), "--prompt", "Anna is", "--device", "cpu"])
        printed = capsys.readouterr()
        assert code in (0, 2), (kind, seed)
        counts[code == 2] += 1
        if code == 2:
            (line,) = printed.err.splitlines()[-1:]
            assert line.startswith("shardlens: ") and line.isprintable(), (kind, seed, line)
            assert len(line) < 1500, (kind, seed)
        shutil.rmtree(copy)
    return counts[0], counts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutated_files(kind: str, tmp_path: Path, capsys: Any) -> None:
    ran, refused = try_files(kind, range(12), tmp_path, capsys)
    assert ran + refused == 12 and refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutated_files(kind: str, tmp_path: Path, capsys: Any) -> None:
    ran, refused = try_files(kind, range(12, 180), tmp_path, capsys)
    assert ran and refused > 20

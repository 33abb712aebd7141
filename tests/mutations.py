"""Inputs changed at random, and the limits within which each runs rightly or is refused.

A fuzz of what strangers may publish and users may type: types, nulls, huge and negative numbers,
nesting, cuts, doubled parts, lies about lengths, escapes.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardlens.cli import main

SECONDS = 20
MEMORY_BYTES = 2 * 2**30
NUMBERS: list[Any] = [True, -1, 0, 1, 1.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")]
VALUES = [*NUMBERS, None, "", "x", "\x1b[2J", "../x", [], [1], {}, {"a": 1}, [[]], "9" * 400]
LENGTHS = [0, 1, 2, 4, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
TEXTS = [
    *("", " ", "-1", "0", "1", "2", "1.5", "1e308", "1e-300", "nan", "inf", "-inf", "9" * 30),
    *("9" * 5000, "0x10", "1_000", "\uff11", "1,2", "-1,0,1", "0-3", "5-", "3-1", ",", "0,0", "[1"),
    *("\x1b[2J", "\u202ex", "a\nb", "\udcd7", "[red]", "{{ x }}", "%s%n", "x" * 300, "x" * 100_000),
    *("..", "~", "~nobody/x", "/", "/dev/null", "/no/such", "file:///x", "a=b", "a=[[[", "all"),
    *("none", "demo", "null", "true", "label", "last_prompt", "resid_post", "cpu", "float32"),
]

Mutation = Callable[[random.Random, Path], None]


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
    return similar(chance, value) if chance.random() < 0.3 else chance.choice(VALUES)


def similar(chance: random.Random, value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return chance.choice([value + 1, -value, value * 2, value - 1])
    return value + "x" if isinstance(value, str) else value


def mutate_json(chance: random.Random, path: Path) -> None:
    kind = chance.random()
    text = path.read_text(encoding="utf-8")
    if kind < 0.05:
        path.write_text(text[: chance.randrange(len(text))], encoding="utf-8")
    elif kind < 0.08:
        path.write_text("[" * 100_000, encoding="utf-8")
    elif kind < 0.1:
        path.write_text('{"a":' * 100_000, encoding="utf-8")
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


def mutate_lines(chance: random.Random, path: Path) -> None:
    """One line of a text file: a JSON record changed, the line doubled, cut, dropped, replaced."""
    lines = path.read_text(encoding="utf-8").split("\n")
    at, kind = chance.randrange(len(lines)), chance.random()
    line = lines[at]
    if kind < 0.4 and line.startswith('{"'):
        lines[at] = json.dumps(mutate(chance, json.loads(line)))
    elif kind < 0.5:
        lines.insert(at, line)
    elif kind < 0.6:
        del lines[at]
    elif kind < 0.75:
        lines[at] = line[: chance.randrange(len(line) + 1)]
    else:
        text = chance.choice(TEXTS)
        lines[at] = chance.choice([text, line + text, text + line, "[" * 100_000])
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))


def mutate_bytes(chance: random.Random, path: Path, within: int = 3000) -> None:
    """Bytes replaced, a length replaced, a part dropped or doubled, the end cut off."""
    data = bytearray(path.read_bytes())
    end = min(len(data), within)
    at, kind = chance.randrange(end), chance.random()
    if kind < 0.35:
        for each in (chance.randrange(end) for _ in range(3)):
            data[each] = chance.randrange(256)
    elif kind < 0.65:
        width = chance.choice("IQ")
        length = chance.choice(LENGTHS) % 2 ** (32 if width == "I" else 64)
        data[at : at + struct.calcsize(width)] = struct.pack(f"<{width}", length)
    elif kind < 0.75:
        del data[at : at + chance.randrange(1, 40)]
    elif kind < 0.85:
        data[at:at] = data[at : at + chance.randrange(1, 40)]
    else:
        del data[chance.randrange(len(data)) :]
    path.write_bytes(data)


def mutate_words(chance: random.Random, words: list[str]) -> list[str]:
    """A command's words with one or two of them replaced, dropped, doubled or joined to a value."""
    changed = list(words)
    for _ in range(chance.choice([1, 1, 2])):
        at, kind = chance.randrange(1, len(changed)), chance.random()
        text = chance.choice(TEXTS)
        if kind < 0.7:
            # mostly a value: an option stands before it
            values = [n for n in range(1, len(changed)) if not changed[n].startswith("--")]
            at = chance.choice(values)
            option = changed[at - 1]
            if option.startswith("--") and text.startswith("-"):
                changed[at - 1 : at + 1] = [f"{option}={text}"]
            else:
                changed[at] = text
        elif kind < 0.8:
            del changed[at]
        elif kind < 0.9:
            changed.insert(at, changed[at])
        else:
            changed.insert(at, text)
        if len(changed) < 2:
            return changed
    return changed


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


def check_refusal(said: str) -> None:
    """Assert that bad input is answered by one short line, which a terminal shows as it is."""
    assert said.startswith("shardlens: ") and said.count("\n") == 1, said[:2000]
    assert said[:-1].isprintable() and len(said) < 1500, said[:2000]


def is_refused(words: list[str], capsys: Any) -> bool:
    """Whether a command refuses its input, in one line, within limits; else it ran to its end."""
    with limits():
        try:
            code = main(words)
        except SystemExit as asked_for_help:
            code = asked_for_help.code if isinstance(asked_for_help.code, int) else 1
    said = capsys.readouterr().err
    assert code in (0, 2), (code, said)
    if code == 2:
        check_refusal(said)
    return code == 2

"""JSON of traces: what is not one is refused in a line that names the field, whatever it holds."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import traced

from shardlens.interp import Trace

WHOLE = r"not a whole number from 0 to 2147483647"
HUGE = 10**400


def content() -> dict[str, Any]:
    """A trace of 3 positions, 2 taps and 3 candidates; the last position has no target."""
    trace = traced(["a", "b", "c"])
    trace.targets[2] = -1
    trace.target_logprob[2], trace.target_rank[2] = float("nan"), -1
    return trace.to_dict()


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    """The content with another value at a path."""
    found = part = content()
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = to
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed("taps", to=None), "taps is of type NoneType, not a list"),
        (changed("taps", to=[]), "taps are none at all"),
        (changed("taps", 1, to=[0, "resid_post"]), "one of them twice"),
        (changed("taps", 0, to=[0, "resid"]), r"taps\[0\] is \[0, 'resid'\], not \[layer, point\]"),
        (changed("taps", 0, to=[-1, "resid_post"]), r"taps\[0\] is"),
        (changed("taps", 0, to=[0, []]), r"taps\[0\] is"),
        (changed("taps", 0, to=[0, "\x1b[2J"]), r"taps\[0\] is \[0, '\\x1b\[2J'\]"),
        (changed("taps", to=[[0, "mlp_out"]]), r"token_ids\[0\] has 2 entries, not 1"),
        (changed("positions", 0, to=-1), rf"positions\[0\] is -1, {WHOLE}"),
        (changed("positions", 0, to=True), rf"positions\[0\] is True, {WHOLE}"),
        (changed("positions", 0, to=1.0), rf"positions\[0\] is 1.0, {WHOLE}"),
        (changed("positions", 0, to=2**31), rf"positions\[0\] is 2147483648, {WHOLE}"),
        (changed("positions", 2, to=3), "positions go beyond the 3 tokens of input_ids"),
        (changed("targets", to=[1, 2]), "targets has 2 entries, not 3"),
        (changed("targets", 0, to=-2), r"targets\[0\] is -2"),
        (changed("targets", 0, to=-1), "target_logprob is not null just where"),
        (changed("token_ids", 1, 0, to=[0, 1]), r"token_ids\[1\]\[0\] has 2 entries, not 3"),
        (changed("token_ids", 1, to={}), r"token_ids\[1\] is of type dict, not a list"),
        (changed("token_ids", 0, 0, to=[]), r"token_ids\[0\]\[0\] is empty"),
        (changed("token_ids", to=[]), "token_ids is empty"),
        (changed("token_ids", 2, 1, 0, to="a"), rf"token_ids\[2\]\[1\]\[0\] is 'a', {WHOLE}"),
        (changed("token_ids", 2, 1, 0, to=HUGE), r"token_ids\[2\]\[1\]\[0\] is 1000"),
        (
            changed("logprobs", 0, 1, 2, to=float("nan")),
            r"logprobs\[0\]\[1\]\[2\] is nan, not a fin",
        ),
        (changed("logprobs", 0, 1, 2, to=None), r"logprobs\[0\]\[1\]\[2\] is None"),
        (changed("logprobs", 0, 1, 2, to=800.0), r"is 800.0, not a finite number up to 0"),
        (changed("logprobs", 0, 1, 2, to=-HUGE), r"logprobs\[0\]\[1\]\[2\] is -1000"),
        (changed("entropy", 1, to=[0.0]), r"entropy\[1\] has 1 entries, not 2"),
        (changed("entropy", 1, 1, to=1e39), r"entropy\[1\]\[1\] is 1e\+39, not a finite number"),
        (changed("entropy", 1, 1, to=float("inf")), r"entropy\[1\]\[1\] is inf"),
        (changed("target_logprob", 0, 0, to=None), "target_logprob is not null just where"),
        (changed("target_logprob", 2, to=[-1.0, -1.0]), "target_logprob is not null just where"),
        (changed("target_rank", 0, 0, to=-1), "target_rank is not -1 just where"),
        (changed("kl_to_final", 0, to="ab"), r"kl_to_final\[0\] is of type str, not a list"),
        (changed("input_ids", 0, to=None), rf"input_ids\[0\] is None, {WHOLE}"),
        (changed("input_ids", to=3), "input_ids is of type int, not a list"),
        (changed("names", to=[1]), "names is of type list, not an object"),
        (changed("names", "x", to="a"), "names has 'x': 'a', not an id and its text"),
        (changed("names", "0", to=3), "names has '0': 3, not an id"),
        (changed("prompt", to=["a"]), "prompt is of type list, not a text"),
        (changed("text", to=1), "text is of type int, not a text"),
        (changed("lens", to=1), "it has a field 'lens', which no trace has"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^this is no trace: .*{says}") as error:
        Trace.from_dict(change)
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(change))
    with pytest.raises(ValueError, match=r"trace\.json: ") as error:
        Trace.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("name", sorted(content()))
def test_a_field_that_is_missing(name: str) -> None:
    """The text, and what belongs to it, may be; nothing of what a lens read may."""
    left = content()
    del left[name]
    if name in ("input_ids", "names", "prompt", "text"):
        assert torch.equal(Trace.from_dict(left).token_ids, Trace.from_dict(content()).token_ids)
        return
    with pytest.raises(ValueError, match=f"^this is no trace: it lacks {name}$"):
        Trace.from_dict(left)


def parts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths to all that JSON holds."""
    if path:
        yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for step, part in items:
            yield from parts(part, (*path, step))


def test_no_value_anywhere_is_another_error() -> None:
    """Odd values at every path: a trace to show and to save, or a ValueError of one line."""
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    odd = [
        None,
        True,
        -1,
        0,
        7,
        0.5,
        -1e300,
        HUGE,
        float("nan"),
        "",
        "\x1b",
        [],
        [[]],
        {},
        {"0": 0},
    ]
    odd.append(deep)
    paths = list(parts(content()))
    assert len(paths) > 90
    n_refused = 0
    for path in paths:
        for value in odd:
            try:
                trace = Trace.from_dict(changed(*path, to=copy.copy(value)))
            except ValueError as error:
                n_refused += 1
                assert str(error).startswith("this is no trace: ") and "\n" not in str(error)
            else:
                trace.grid()
                trace.columns()
                assert Trace.from_dict(trace.to_dict()).to_dict() == trace.to_dict()
    assert n_refused > len(paths) * len(odd) / 2
    while deep:  # taken apart by hand: Python would recurse
        deep = deep[0]


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "[" * 100_000, "3", '{"taps": []}', "\ud800", '{"taps": ' + "9" * 5_000 + "}", ""],
)
def test_no_json_of_a_trace_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"trace\.json.*") as error:
        Trace.load(path)
    assert "\n" not in str(error.value)


def test_damaged_files(tmp_path: Path) -> None:
    """Bytes lost, doubled or changed at random: read as a trace, or refused by the file's name."""
    path, generator = tmp_path / "trace.json", random.Random(0)
    traced(["a", "b\x1b", "日本"]).save(path)
    whole, n_refused = path.read_bytes(), 0
    for _ in range(300):
        at = generator.randrange(len(whole))
        middle = generator.choice([b"", whole[at : at + 9] * 2, bytes([generator.randrange(256)])])
        path.write_bytes(whole[:at] + middle + whole[at + generator.randrange(1, 9) :])
        try:
            Trace.load(path).grid()
        except ValueError as error:
            n_refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert n_refused > 200


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"none\.json does not exist; give a trace$"):
        Trace.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"trace\.png: a trace is read from \.json"):
        Trace.load(tmp_path / "trace.png")
    (tmp_path / "large.json").touch()
    with (tmp_path / "large.json").open("r+b") as file:
        file.truncate(2**28 + 1)  # no block of it is written
    with pytest.raises(ValueError, match=r"large\.json is larger than 256 MiB"):
        Trace.load(tmp_path / "large.json")

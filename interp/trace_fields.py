"""The fields of a trace in JSON: written with None for NaN, and read with each of them checked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.fields import shown
from ..model.points import POINTS, Tap

LARGEST_BYTES = 256 * 2**20  # of a file: a million cells, which is 13,000 positions of 80 layers
LARGEST = 2**31 - 1  # of ids, positions, layers and ranks
FLOATS = (-3.4e38, 3.4e38)  # what float32 holds
ROUNDING = 0.01  # by which float32 may pass a bound that exact numbers keep
LOGPROBS = (-3.4e38, ROUNDING)

NUMBERS = (
    *("positions", "targets", "token_ids", "logprobs", "entropy"),
    *("target_logprob", "target_rank", "kl_to_final"),
)
OPTIONAL = ("input_ids", "names", "prompt", "text")
Check = Callable[[Any], bool]


def written_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a trace as plain lists, numbers and texts."""
    plain = {
        name: _without_nan(value.tolist()) if isinstance(value, Tensor) else value
        for name, value in fields.items()
    }
    plain["taps"] = [list(tap) for tap in fields["taps"]]
    plain["names"] = {str(token): text for token, text in fields["names"].items()}
    texts = {name: plain.pop(name) for name in ("prompt", "text")}
    return texts | plain


def read_fields(content: Any) -> dict[str, Any]:
    """The fields of a trace. Raises ValueError, in one line that names what is wrong."""
    if not isinstance(content, Mapping):
        raise ValueError(f"it is of type {type(content).__name__}, not an object")
    for name in ("taps", *NUMBERS):
        if name not in content:
            raise ValueError(f"it lacks {name}")
    known = {"taps", *NUMBERS, *OPTIONAL}
    unknown = [name for name in content if name not in known]
    if unknown:
        raise ValueError(f"it has a field {shown(unknown[0])}, which no trace has")
    taps = _taps(content["taps"])
    tensors = _tensors(content, len(taps))
    _check_targets(tensors)
    input_ids = content.get("input_ids", [])
    _check_all("input_ids", input_ids, [_length(input_ids, "input_ids")], *WHOLE)
    if any(before >= after for before, after in itertools.pairwise(content["positions"])):
        raise ValueError("positions do not rise")
    if input_ids and any(at >= len(input_ids) for at in content["positions"]):
        raise ValueError(f"positions go beyond the {len(input_ids)} tokens of input_ids")
    return {
        "taps": taps,
        **tensors,
        "input_ids": list(input_ids),
        "names": _names(content.get("names", {})),
        "prompt": _text(content, "prompt"),
        "text": _text(content, "text"),
    }


def _is_whole(value: Any, low: int = 0) -> bool:
    return type(value) is int and low <= value <= LARGEST


def _is_target(value: Any) -> bool:
    return _is_whole(value, -1)


def _is_nats(value: Any) -> bool:
    return type(value) in (int, float) and -ROUNDING <= value <= FLOATS[1]


def _is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and LOGPROBS[0] <= value <= LOGPROBS[1]


def _is_logprob_or_none(value: Any) -> bool:
    return value is None or _is_logprob(value)


# a check of a number, and what is said where it fails
WHOLE: tuple[Check, str] = (_is_whole, f"a whole number from 0 to {LARGEST}")
TARGET: tuple[Check, str] = (_is_target, f"a whole number from -1 to {LARGEST}")
NATS: tuple[Check, str] = (_is_nats, "a finite number from 0")
LOGPROB: tuple[Check, str] = (_is_logprob, "a finite number up to 0")
LOGPROB_OR_NONE: tuple[Check, str] = (_is_logprob_or_none, "a finite number up to 0, or null")


def _taps(value: Any) -> tuple[Tap, ...]:
    n_taps = _length(value, "taps")
    for index, pair in enumerate(value):
        is_pair = isinstance(pair, list) and len(pair) == 2 and _is_whole(pair[0])
        if not is_pair or not isinstance(pair[1], str) or pair[1] not in POINTS:
            raise ValueError(f"taps[{index}] is {shown(pair)}, not [layer, point]")
    taps = tuple(Tap(*pair) for pair in value)
    if not taps or len(set(taps)) < n_taps:
        raise ValueError("taps are none at all, or one of them twice")
    return taps


def _tensors(content: Mapping[str, Any], n_taps: int) -> dict[str, Tensor]:
    n_positions = _length(content["positions"], "positions")
    k = _width(content["token_ids"]) if n_positions else 0
    by_position, by_tap = [n_positions], [n_positions, n_taps]
    by_candidate = [*by_tap, k]

    def tensor(name: str, shape: list[int], check: Check, what: str, dtype: torch.dtype) -> Tensor:
        numbers = _check_all(name, content[name], shape, check, what)
        with_nan = [float("nan") if number is None else number for number in numbers]
        return torch.tensor(with_nan, dtype=dtype).reshape(shape)

    whole, real = torch.int64, torch.float32
    return {
        "positions": tensor("positions", by_position, *WHOLE, whole),
        "targets": tensor("targets", by_position, *TARGET, whole),
        "token_ids": tensor("token_ids", by_candidate, *WHOLE, whole),
        "logprobs": tensor("logprobs", by_candidate, *LOGPROB, real),
        "entropy": tensor("entropy", by_tap, *NATS, real),
        "target_logprob": tensor("target_logprob", by_tap, *LOGPROB_OR_NONE, real),
        "target_rank": tensor("target_rank", by_tap, *TARGET, whole),
        "kl_to_final": tensor("kl_to_final", by_tap, *NATS, real),
    }


def _check_targets(tensors: Mapping[str, Tensor]) -> None:
    has_none = (tensors["targets"] < 0)[:, None]
    if not torch.equal(tensors["target_logprob"].isnan(), has_none.expand_as(tensors["entropy"])):
        raise ValueError("target_logprob is not null just where there is no target")
    if not torch.equal(tensors["target_rank"] < 0, has_none.expand_as(tensors["entropy"])):
        raise ValueError("target_rank is not -1 just where there is no target")


def _length(value: Any, name: str) -> int:
    if not isinstance(value, list):
        raise ValueError(f"{name} is of type {type(value).__name__}, not a list")
    return len(value)


def _width(token_ids: Any) -> int:
    """How many candidates the first cell has."""
    for name in ("token_ids", "token_ids[0]", "token_ids[0][0]"):
        n_held = _length(token_ids, name)
        if not n_held:
            raise ValueError(f"{name} is empty")
        token_ids = token_ids[0]
    return n_held


def _check_all(name: str, value: Any, shape: Sequence[int], check: Check, what: str) -> list[Any]:
    """All numbers of nested lists of a shape, of which the check holds."""
    for depth, n_held in enumerate(shape):
        for index, part in enumerate([value] if depth == 0 else value):
            where = name + _at(index, shape[:depth])
            if _length(part, where) != n_held:
                raise ValueError(f"{where} has {len(part)} entries, not {n_held}")
        value = value if depth == 0 else list(itertools.chain.from_iterable(value))
    for index, number in enumerate(value):
        if not check(number):
            raise ValueError(f"{name}{_at(index, shape)} is {shown(number)}, not {what}")
    return value


def _at(index: int, shape: Sequence[int]) -> str:
    """The index of an entry among all of a shape, as "[1][0][2]"."""
    found = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        found.append(f"[{rest}]")
    return "".join(reversed(found))


def _names(value: Any) -> dict[int, str]:
    if not isinstance(value, Mapping):
        raise ValueError(f"names is of type {type(value).__name__}, not an object")
    for token, text in value.items():
        is_id = isinstance(token, str) and re.fullmatch("0|[1-9][0-9]{0,9}", token) is not None
        if not is_id or not isinstance(text, str):
            raise ValueError(f"names has {shown(token)}: {shown(text)}, not an id and its text")
    return {int(token): text for token, text in value.items()}


def _text(content: Mapping[str, Any], name: str) -> str | None:
    value = content.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is of type {type(value).__name__}, not a text")
    return value


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if value != value else value

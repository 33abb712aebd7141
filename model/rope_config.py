"""How config.json scales rotary frequencies for longer contexts, in any of its three spellings.

transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`. Where a
user has added `rope_scaling` to a newer file, that is in force (Qwen's own advice for YaRN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .fields import Fields

_DEFAULT_THETA = 10_000.0
_MOST_FACTOR = 1e6
_MOST_CONTEXT = 2**27


@dataclass(frozen=True)
class RopeScaling:
    """How inverse frequencies are changed: kind "default", "linear", "llama3", "yarn", "dynamic".

    original_context: positions that the model was trained on. attention_factor: what cosines and
    sines are multiplied by. low, high: of "llama3", the wavelengths per original context between
    which it interpolates; of "yarn", the rotations (beta_slow, beta_fast). truncate: whether YaRN
    rounds the dimensions that belong to those to whole ones. factors: of "factors", which .gguf
    files have, what each frequency is divided by.
    """

    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192
    attention_factor: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


_KEYS = {
    "default": {"factor", "original_max_position_embeddings"},
    "linear": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",
    },
}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(config: Fields, context: int) -> tuple[float, RopeScaling, int]:
    """The base of the frequencies, their scaling, and the context that it makes of `context`.

    Raises ValueError naming a field that is missing, unknown, out of bounds or contradicted.
    """
    scaling = config.object("rope_scaling")
    rope = scaling or config.object("rope_parameters")
    theta: float = config.number("rope_theta", 1.0, 1e15, _DEFAULT_THETA)
    if rope is None:
        return theta, RopeScaling(), context
    theta = rope.number("rope_theta", 1.0, 1e15, theta)
    _check_theta(config, scaling, theta)
    kind = _kind(rope)
    rope.refuse_unknown(_COMMON | _KEYS[kind])
    if rope.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "not supported: only 1")
    if kind == "default":
        return theta, RopeScaling(), context
    read = {"llama3": _llama3, "yarn": _yarn, "linear": _linear, "dynamic": _dynamic}[kind]
    found = read(rope, context)
    stretched = int(found.original_context * found.factor) if kind in ("yarn", "dynamic") else 0
    return theta, found, min(_MOST_CONTEXT, max(context, stretched))


def _check_theta(config: Fields, scaling: Fields | None, theta: float) -> None:
    """Refuse another base in the block that is not in force: engines differ about which counts."""
    parameters = config.object("rope_parameters")
    if scaling is None or parameters is None:
        return
    other = parameters.number("rope_theta", 1.0, 1e15, theta)
    if other != theta:
        raise ValueError(
            f"{config.source}: rope_scaling is in force, with a rope_theta of {theta:g}, and "
            f"rope_parameters says {other:g}; write the same into both"
        )


def _kind(rope: Fields) -> str:
    """The rope_type, or `type` as it was called."""
    kinds = [rope.choice(n, _KEYS, "default") for n in ("rope_type", "type") if n in rope]
    if len(set(kinds)) > 1:
        raise rope.error("rope_type", f"but its type is {kinds[1]!r}; they must agree")
    return kinds[0] if kinds else "default"


def _linear(rope: Fields, context: int) -> RopeScaling:
    return RopeScaling("linear", rope.number("factor", 1.0, _MOST_FACTOR))


def _dynamic(rope: Fields, context: int) -> RopeScaling:
    factor = rope.number("factor", 1.0, _MOST_FACTOR)
    return RopeScaling("dynamic", factor, original_context=context)


def _llama3(rope: Fields, context: int) -> RopeScaling:
    low = rope.number("low_freq_factor", 1e-6, 1e6)
    high = rope.number("high_freq_factor", 1e-6, 1e6)
    if low >= high:
        raise rope.error("low_freq_factor", f"not below high_freq_factor {high:g}")
    return RopeScaling(
        "llama3",
        rope.number("factor", 1.0, _MOST_FACTOR),
        low,
        high,
        rope.integer("original_max_position_embeddings", 1, _MOST_CONTEXT),
    )


def _yarn(rope: Fields, context: int) -> RopeScaling:
    """YaRN (Peng et al., arXiv 2309.00071), with the defaults of transformers."""
    original = rope.integer("original_max_position_embeddings", 1, _MOST_CONTEXT, context)
    factor = rope.number("factor", 1.0, _MOST_FACTOR, max(1.0, context / original))
    slow = rope.number("beta_slow", 1e-6, 1e6, 1.0)
    fast = rope.number("beta_fast", 1e-6, 1e6, 32.0)
    if slow > fast:
        raise rope.error("beta_slow", f"above beta_fast {fast:g}")
    return RopeScaling(
        "yarn",
        factor,
        slow,
        fast,
        original,
        rope.number("attention_factor", 1e-3, 1e3, _attention_factor(rope, factor)),
        rope.flag("truncate", True),
    )


def _attention_factor(rope: Fields, factor: float) -> float:
    """0.1 ln(factor) + 1, or the ratio of two such with mscale and mscale_all_dim."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    mscale = rope.number("mscale", 0.0, 1e3, 0.0)
    mscale_all_dim = rope.number("mscale_all_dim", 0.0, 1e3, 0.0)
    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)

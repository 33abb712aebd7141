"""A LoRA adapter of PEFT, added to the weights that it was trained on while they are read.

W + s B A (Hu et al., arXiv 2106.09685), with s = alpha / r, or alpha / sqrt(r) for rank-stabilised
adapters: each rank computes its own rows and columns of B A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..parallel.spans import Span
from ..tokenizer.json_file import read_json
from .fields import Fields, shown
from .safetensors_files import opened
from .stored import Weights

MOST_PATTERNS = 2_000  # each is compared with each module's name
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+?)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?"
)
# Settings under which a weight is not W + s B A.
_NEUTRAL = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "megatron_config": None,
    "modules_to_save": None,
    "use_dora": False,
    "use_qalora": False,
}


@dataclass(frozen=True)
class _Pair:
    """a [r, in], b [out, r], float32; scale: s."""

    a: Tensor
    b: Tensor
    scale: float


class AdaptedWeights:
    """Weights with an adapter added; see `Weights`.

    Raises ValueError naming the file, the setting or the tensor where the adapter is broken, is no
    LoRA, or changes what `base` does not hold.
    """

    def __init__(self, base: Weights, directory: Path) -> None:
        self._base = base
        self.origin, self.shapes = base.origin, base.shapes
        config = _read_config(directory)
        self._pairs = {
            f"{module}.weight": _Pair(a, b, _scale(config, module, a.shape[0]))
            for module, (a, b) in _read_pairs(directory / TENSORS).items()
        }
        for name, pair in self._pairs.items():
            held = base.shapes.get(name)
            if held != (pair.b.shape[0], pair.a.shape[1]):
                raise ValueError(
                    f"{directory} changes {shown(name)} of shape "
                    f"{[pair.b.shape[0], pair.a.shape[1]]}, where {base.origin} holds "
                    f"{'no such tensor' if held is None else list(held)}"
                )

    def read(self, name: str, rows: Span, columns: Span | None) -> Iterator[tuple[int, Tensor]]:
        """As `Weights.read`; changed weights come in float32."""
        pair = self._pairs.get(name)
        for offset, block in self._base.read(name, rows, columns):
            if pair is not None and columns is not None:
                start = rows.start + offset
                b = pair.b[start : start + block.shape[0]]
                block = block.float() + pair.scale * (b @ pair.a[:, columns.start : columns.stop])
            yield offset, block


def _read_config(directory: Path) -> Fields:
    config = Fields(read_json(directory / CONFIG), str(directory / CONFIG))
    config.choice("peft_type", ("LORA",), "LORA")
    for name, neutral in _NEUTRAL.items():
        if config.value(name) not in (None, neutral, []):
            raise config.error(name, f"not supported: only {neutral!r}")
    return config


def _scale(config: Fields, module: str, rank: int) -> float:
    """s of a module: r and alpha may differ by a pattern of its name, of which the first counts.

    Raises ValueError where the config says another r than the tensors have.
    """
    given = _by_pattern(config, "rank_pattern", module)
    if given is None:
        given = config.integer("r", 1, 2**16, rank)
    if given != rank:
        raise ValueError(
            f"{config.source} gives {shown(module)} an r of {given:g}, where its A and B have "
            f"{rank}"
        )
    alpha = _by_pattern(config, "alpha_pattern", module)
    if alpha is None:
        alpha = config.number("lora_alpha", 0.0, 1e6)
    return float(alpha) / (math.sqrt(rank) if config.flag("use_rslora", False) else rank)


def _by_pattern(config: Fields, name: str, module: str) -> float | None:
    patterns = config.object(name)
    if patterns is not None and len(patterns.names()) > MOST_PATTERNS:
        raise ValueError(f"{config.source}: {name} has more than {MOST_PATTERNS:,} patterns")
    for pattern in [] if patterns is None else patterns.names():
        assert patterns is not None
        if not re.fullmatch(r"[\w.]+", pattern):
            raise patterns.error(pattern, "for an expression: only the ends of names are read")
        if f".{module}".endswith(f".{pattern}"):
            return float(patterns.number(pattern, 0.0, 1e6))
    return None


def _read_pairs(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the name of the module that they change."""
    parts: dict[str, dict[str, Tensor]] = {}
    with opened(path) as file:
        for name in sorted(file.keys()):
            match = _NAME.fullmatch(name)
            tensor = file.get_tensor(name)
            if match is None or tensor.dim() != 2 or not tensor.is_floating_point():
                raise ValueError(f"{path}: tensor {shown(name)} is neither A nor B of a LoRA")
            # of an embedding, PEFT stores both transposed
            is_embedding = ".lora_embedding_" in name
            part = tensor.float().T if is_embedding else tensor.float()
            key = {"A": "B", "B": "A"}[match[2]] if is_embedding else match[2]
            parts.setdefault(match[1], {})[key] = part
    for module, pair in parts.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"{path}: {shown(module)} lacks A [r, in] and B [out, r] of one r")
    if not parts:
        raise ValueError(f"{path} holds no tensors")
    return {module: (pair["A"], pair["B"]) for module, pair in parts.items()}

"""The safetensors files of a directory in Hugging Face layout: one, or an index and its shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..parallel.spans import Span
from ..tokenizer.json_file import read_json
from ..tokenizer.paths import check_regular
from .fields import shown
from .stored import row_blocks

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Tensors that no layer here computes with, whatever the model: frequencies that are derived,
# masks of older versions, scales of a quantised cache, the value head of RLHF.
SKIPPED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|[kv]_scale|kv_scale)$|^v_head\.")
MOST_HEADER_BYTES = 8 * 2**20  # some 60,000 tensors in one file
MOST_TENSORS = 200_000  # 1,024 layers of FP8 with their scales have 20,000
_FLOATS = {"F64", "F32", "BF16", "F16"}
_FP8 = "F8_E4M3"
_SCALE = "_scale_inv"  # of blocks of an FP8 weight: what they are multiplied by


class SafetensorsFiles:
    """Tensors of a directory; see `Weights`. fp8_block: rows and columns that share a scale.

    Raises ValueError naming the file or the tensor that is missing, broken, of a type that is no
    weight, or outside the directory.
    """

    def __init__(self, directory: Path, fp8_block: tuple[int, int] | None = None) -> None:
        self.origin = str(directory)
        self._block = fp8_block
        files = _files(directory)
        prefix = "" if "model.embed_tokens.weight" in files else "model."
        self._stored: dict[str, tuple[Path, str]] = {}  # by transformers' name
        for name, path in files.items():
            is_bare = name.startswith(("embed_tokens.", "layers.", "norm."))
            self._stored[prefix + name if is_bare else name] = path, name
        self._kinds: dict[str, str] = {}
        shapes = self._headers()
        self.shapes = {name: s for name, s in shapes.items() if not self._is_scale(name)}

    def read(self, name: str, rows: Span, columns: Span | None) -> Iterator[tuple[int, Tensor]]:
        """As `Weights.read`; FP8 weights come in float32, multiplied by their scales."""
        path, stored = self._stored[name]
        for start, stop in row_blocks(rows, self.shapes[name]):
            with opened(path) as file:
                part = file.get_slice(stored)
                if columns is None:
                    block = part[start:stop]
                else:
                    block = part[start:stop, columns.start : columns.stop]
            if self._kinds[name] == _FP8:
                block = block.float() * self._scales(name, start, stop, columns)
            yield start - rows.start, block

    def _scales(self, name: str, start: int, stop: int, columns: Span | None) -> Tensor:
        """The scale of each number of a part."""
        assert self._block is not None and columns is not None
        (height, width), (path, stored) = self._block, self._stored[name + _SCALE]
        first_row, first_column = start // height, columns.start // width
        with opened(path) as file:
            scales = file.get_slice(stored)[
                first_row : -(-stop // height), first_column : -(-columns.stop // width)
            ].float()
        scales = scales.repeat_interleave(height, 0)[start - first_row * height :]
        scales = scales.repeat_interleave(width, 1)[:, columns.start - first_column * width :]
        return scales[: stop - start, : columns.size]

    def _is_scale(self, name: str) -> bool:
        return name.endswith(_SCALE) and self._kinds.get(name.removesuffix(_SCALE)) == _FP8

    def _headers(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors that are not skipped; their types are checked."""
        by_file: dict[Path, list[str]] = {}
        for name, (path, _) in self._stored.items():
            by_file.setdefault(path, []).append(name)
        shapes: dict[str, tuple[int, ...]] = {}
        for path, names in sorted(by_file.items()):
            with opened(path) as file:
                held = set(file.keys())
                for name in names:
                    stored = self._stored[name][1]
                    if stored not in held:
                        raise ValueError(
                            f"{path} lacks tensor {stored}, which the index puts there"
                        )
                    if not SKIPPED.search(name):
                        part = file.get_slice(stored)
                        shapes[name], self._kinds[name] = tuple(part.get_shape()), part.get_dtype()
        self._check_kinds(shapes)
        return shapes

    def _check_kinds(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, kind in self._kinds.items():
            if kind == _FP8 and self._block is not None:
                blocks = tuple(-(-n // b) for n, b in zip(shapes[name], self._block, strict=False))
                if shapes.get(name + _SCALE) != blocks or len(shapes[name]) != 2:
                    raise ValueError(
                        f"tensor {name} of {self.origin} is FP8 of shape {list(shapes[name])}, and "
                        f"its scales {name}{_SCALE} are not of shape {list(blocks)}"
                    )
            elif kind not in _FLOATS:
                raise ValueError(
                    f"tensor {name} of {self.origin} is of type {kind}, which is no weight here: "
                    f"only {', '.join(sorted(_FLOATS))} are read"
                )


def weight_files(index: Path) -> dict[str, str]:
    """The file of every tensor, as an index says. Raises ValueError for names that are no files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    if len(weight_map) > MOST_TENSORS:
        raise ValueError(
            f"{index} names {len(weight_map):,} tensors: at most {MOST_TENSORS:,} are read"
        )
    for name, file in weight_map.items():
        is_plain = isinstance(file, str) and file == Path(file).name and "\\" not in file
        if not is_plain or file in ("", ".."):
            raise ValueError(
                f"{index}: tensor {shown(name)} is in {shown(file)}, which is not the name of a "
                "file beside the index"
            )
    return weight_map


def _files(directory: Path) -> dict[str, Path]:
    index, single = directory / INDEX, directory / SINGLE
    if index.exists():
        files = weight_files(index)
        if single.exists() and SINGLE not in files.values():
            raise ValueError(
                f"{directory} holds both {SINGLE} and {INDEX}, which does not name it, and engines "
                "differ about which counts: move one of them away"
            )
        return {name: directory / file for name, file in files.items()}
    if not single.exists():
        pickled = next((path.name for path in sorted(directory.glob("*.bin"))), None)
        instead = f" ({pickled} is a pickle: take a revision in safetensors)" if pickled else ""
        if any(directory.glob("*.distcp")):
            instead = ", and .distcp files with the .metadata that is written last, missing here"
        raise ValueError(
            f"{directory} holds neither {SINGLE} nor {INDEX}: only safetensors weights are "
            f"read{instead}"
        )
    with opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def check_header(path: Path) -> None:
    """Raise ValueError with the reason for a header that no model needs: each opening parses it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER_BYTES:
        raise ValueError(
            f"it says that its header has {size:,} bytes: at most {MOST_HEADER_BYTES:,} are read"
        )


def opened(path: Path) -> safe_open:
    """The tensors of one file. Raises ValueError for a file that is missing or broken."""
    check_regular(path)
    try:
        check_header(path)
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: fetch it from the model") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None

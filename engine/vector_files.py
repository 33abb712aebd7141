"""Steering vectors as files: safetensors for everything, gguf for llama.cpp and repeng.

A gguf control vector holds `direction.K`, one dim of float32, which llama.cpp adds to the output of
block K counted from 0: our Tap(K, "resid_post"). repeng numbers its layers in the same way (its
direction K is made from and added to the output of block K), so nothing is shifted. llama.cpp has
no direction.0: it refuses a file that has one. repeng may write one; it is read, but never written.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..model.arguments import number
from ..model.gguf_header import GGUF_BROKEN, gguf_reader
from ..model.points import POINTS, Tap
from ..model.safetensors_files import check_header
from ..tokenizer.paths import check_regular
from .files import replacing
from .tap_names import tap_name
from .vector_fields import Origin, VectorFields

FORMAT = "shardlens steering vectors"
VERSION = 1
ARCHITECTURE = "controlvector"
OURS = "shardlens."  # starts the names of what other readers of a gguf file do not ask for


class Format(NamedTuple):
    write: Callable[[VectorFields, Path], None]
    read: Callable[[Path, int | None], VectorFields]


def write_fields(fields: VectorFields, path: Path) -> None:
    """Write in the format that the ending of `path` names, or nothing.

    Raises ValueError for other endings and for vectors that the format cannot hold, and as
    `replacing` does.
    """
    check_format(path, fields.vectors)
    _format(path).write(fields, path)


def read_fields(path: Path, n_layers: int | None = None) -> VectorFields:
    """The content of a file. Raises ValueError naming the file if it is broken.

    n_layers: the model's depth, for files of other tools, which do not say it.
    """
    check_format(path)
    check_regular(path)
    with naming_file(path):
        return _format(path).read(path, n_layers)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Errors of the block as ValueErrors that begin with the file's name."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_format(path: Path, taps: Iterable[Tap] = ()) -> None:
    """Raise ValueError if vectors at `taps` cannot be written to `path`; cheap, for before work."""
    if _format(path) is _FORMATS[".gguf"]:
        for tap in taps:
            _block_of(tap)


def _format(path: Path) -> Format:
    if path.suffix not in _FORMATS:
        raise ValueError(
            f"{path}: steering vectors are kept as {' or '.join(_FORMATS)}, by the ending"
        )
    return _FORMATS[path.suffix]


def _write_safetensors(fields: VectorFields, path: Path) -> None:
    tensors = {f"{tap.point}.{tap.layer}": vector for tap, vector in fields.vectors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "n_layers": str(fields.n_layers),
        "resid_norms": _norms_text(fields.resid_norms),
        "origin": _origin_text(fields.origin),
    }
    with replacing(path) as file:
        file.write(save(tensors, metadata))


def _read_safetensors(path: Path, _: int | None) -> VectorFields:
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"this is not a whole safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError("this safetensors file does not hold steering vectors of shardlens")
    texts = _Texts(metadata)
    texts.check_version()
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"tensor {name} is {tensor.dtype}, not torch.float32")
    return VectorFields(
        {_parse_tap(name): tensor for name, tensor in tensors.items()},
        texts.norms(),
        texts.whole_number("n_layers"),
        texts.origin(),
    )


def _write_gguf(fields: VectorFields, path: Path) -> None:
    from gguf import GGUFWriter
    from gguf.gguf_writer import WriterState

    blocks = {_block_of(tap): vector for tap, vector in fields.vectors.items()}
    norms = {Tap(_block_of(tap), "resid_post"): norm for tap, norm in fields.resid_norms.items()}
    writer = GGUFWriter(None, ARCHITECTURE)
    # A writer leaves out empty strings, and repeng refuses a file without a hint.
    writer.add_string(f"{ARCHITECTURE}.model_hint", fields.origin.model or "unknown")
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(blocks))  # as repeng counts
    writer.add_string(f"{OURS}version", str(VERSION))
    writer.add_string(f"{OURS}n_layers", str(fields.n_layers))
    writer.add_string(f"{OURS}resid_norms", _norms_text(norms))
    writer.add_string(f"{OURS}origin", _origin_text(fields.origin))
    for block, vector in blocks.items():
        writer.add_tensor(f"direction.{block}", vector.numpy())
    with replacing(path) as file:
        # given a path, it would open files by itself
        writer.fout, writer.state = [cast(BufferedWriter, file)], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _block_of(tap: Tap) -> int:
    """K of the `direction.K` that is added where `tap` is. Raises ValueError if there is none."""
    canonical = tap.canonical
    if canonical.point != "resid_pre":
        raise ValueError(
            f"gguf holds vectors for the output of blocks (resid_post), not {tap_name(tap)}: "
            "save as .safetensors"
        )
    block = canonical.layer - 1
    if block < 1:
        what = "the embedding" if block < 0 else "the output of layer 0"
        raise ValueError(
            f"gguf has no room for {what}, which is {tap_name(tap)} (llama.cpp starts at layer 1): "
            "leave it out by giving layers, or save as .safetensors"
        )
    return block


def _read_gguf(path: Path, n_layers: int | None) -> VectorFields:
    from gguf import GGMLQuantizationType

    try:
        reader = gguf_reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except GGUF_BROKEN as error:
        raise ValueError(f"this is not a whole gguf file ({error})") from None
    if fields.get("general.architecture") != ARCHITECTURE:
        raise ValueError(
            f"this gguf file holds {fields.get('general.architecture', 'nothing known')}, "
            f"not a {ARCHITECTURE}"
        )
    vectors: dict[Tap, Tensor] = {}
    for held in reader.tensors:
        match = re.fullmatch(r"direction\.(0|[1-9][0-9]{0,5})", held.name)
        if match is None:
            raise ValueError(f"tensor {held.name} is no direction.K of a {ARCHITECTURE}")
        if held.tensor_type != GGMLQuantizationType.F32:
            raise ValueError(f"tensor {held.name} is {held.tensor_type.name}, not F32")
        # a copy in this machine's byte order: what the reader gives is a view of the file
        vectors[Tap(int(match[1]), "resid_post")] = torch.from_numpy(held.data.astype("=f4"))
    texts = _Texts({name.removeprefix(OURS): fields[name] for name in fields if OURS in name})
    if not texts:  # of another tool
        depth = _least_depth(vectors, fields) if n_layers is None else n_layers
        return VectorFields(vectors, {}, depth, Origin(method="gguf"))
    texts.check_version()
    return VectorFields(vectors, texts.norms(), texts.whole_number("n_layers"), texts.origin())


def _least_depth(vectors: Iterable[Tap], fields: dict[str, Any]) -> int:
    """Layers that a model needs to have. Some tools count it, others their directions."""
    count = fields.get(f"{ARCHITECTURE}.layer_count")
    counted = count if isinstance(count, int) else 0
    return max([counted, *(tap.layer + 1 for tap in vectors)])


_FORMATS = {
    ".safetensors": Format(_write_safetensors, _read_safetensors),
    ".gguf": Format(_write_gguf, _read_gguf),
}


def _norms_text(norms: dict[Tap, float]) -> str:
    return json.dumps({f"{tap.point}.{tap.layer}": norm for tap, norm in norms.items()})


def _origin_text(origin: Origin) -> str:
    return json.dumps(dataclasses.asdict(origin))


def _parse_tap(name: str) -> Tap:
    match = re.fullmatch(r"([a-z_]+)\.(0|[1-9][0-9]{0,5})", name)
    if match is None or match[1] not in POINTS:
        raise ValueError(f"{name} is no POINT.LAYER of a steering vector")
    return Tap(int(match[2]), match[1])


class _Texts(dict[str, str]):
    """Our metadata as a file holds it. Each reader raises ValueError naming what is wrong."""

    def text(self, name: str) -> str:
        text = self.get(name)
        if not isinstance(text, str):
            raise ValueError(f"metadata {name} is missing")
        return text

    def whole_number(self, name: str) -> int:
        text = self.text(name)
        if re.fullmatch("[1-9][0-9]{0,5}", text) is None:
            raise ValueError(f"metadata {name} is {text!r}, not a whole number")
        return int(text)

    def check_version(self) -> None:
        version = self.whole_number("version")
        if version > VERSION:
            raise ValueError(f"version {version} of the format needs a newer shardlens")

    def _object(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(self.text(name))
        except RecursionError:
            raise ValueError(f"metadata {name} is nested too deep") from None
        except ValueError as error:
            raise ValueError(f"metadata {name} is no JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"metadata {name} is no JSON object")
        return content

    def norms(self) -> dict[Tap, float]:
        norms = {}
        for name, norm in self._object("resid_norms").items():
            norms[_parse_tap(name)] = number(norm, f"metadata resid_norms: {name[:80]}")
        return norms

    def origin(self) -> Origin:
        content = self._object("origin")
        for field in dataclasses.fields(Origin):
            value = content.get(field.name, field.default)
            if field.name == "pair_keys" and isinstance(value, list):
                value = tuple(value)
                if not all(isinstance(key, str) for key in value):
                    value = None
            if type(value) is not type(field.default):
                raise ValueError(f"metadata origin: {field.name} is {value!r}")
            content[field.name] = value
        return Origin(**{field.name: content[field.name] for field in dataclasses.fields(Origin)})

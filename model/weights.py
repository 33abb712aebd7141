"""Fill a model's parameters: from safetensors, each rank reading its own slices, or at random."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..parallel.spans import Placed, Span
from ..tokenizer.json_file import read_json
from .sharding import placements
from .transformer import Transformer

# Bounds what lies in memory beside the parameters: a mapped file's pages count as ours until the
# file is closed, so it is closed after every block of this size.
BLOCK_BYTES = 16 * 2**20

# (tensor of the checkpoint, rows start:stop of it, columns start:stop or all) -> that part
ReadFn = Callable[[Placed, Span, Span | None], Iterator[tuple[int, Tensor]]]


class Checkpoint:
    """The safetensors files of a directory in Hugging Face layout: one, or an index and shards.

    Raises ValueError naming the file that is missing or broken.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file_of = self._files()
        self.shapes = self._shapes()

    def _files(self) -> dict[str, Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map")
            return {name: self.directory / file for name, file in weight_map.items()}
        single = self.directory / "model.safetensors"
        if not single.exists():
            raise ValueError(
                f"{self.directory} holds neither model.safetensors nor "
                "model.safetensors.index.json: only safetensors weights are read"
            )
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self.file_of.values())):
            with _opened(path) as file:
                held = set(file.keys())
                for name in (name for name, where in self.file_of.items() if where == path):
                    if name not in held:
                        raise ValueError(f"{path} lacks tensor {name}, which the index puts there")
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        return shapes

    def check(self, expected: dict[str, tuple[int, ...]], ignorable: frozenset[str]) -> None:
        """Compare names and shapes with what the model needs. Raises ValueError."""
        missing = sorted(expected.keys() - self.shapes.keys())
        if missing:
            raise ValueError(f"{self.directory} lacks {_named(missing)}")
        left_over = sorted(
            name
            for name in self.shapes.keys() - expected.keys() - ignorable
            if not name.endswith("rotary_emb.inv_freq")  # older exports store it; it is derived
        )
        if left_over:
            raise ValueError(
                f"{self.directory} holds {_named(left_over)}, which the model has no use for"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"tensor {name} of {self.directory} has shape {list(self.shapes[name])}, "
                    f"the config asks for {list(shape)}"
                )

    def read(
        self, placed: Placed, rows: Span, columns: Span | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (row offset within the part, block) over this rank's part of one tensor."""
        path = self.file_of[placed.source]
        full_shape = self.shapes[placed.source]
        row_bytes = 4 * (full_shape[1] if columns is not None else 1)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(rows.start, rows.stop, step):
            stop = min(rows.stop, start + step)
            with _opened(path) as file:
                part = file.get_slice(placed.source)
                if columns is None:
                    yield start - rows.start, part[start:stop]
                else:
                    yield start - rows.start, part[start:stop, columns.start : columns.stop]


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, but the index names it") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"


def load_weights(
    model: Transformer,
    directory: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill `model` from `directory`, casting to the model's dtype.

    Peak memory beside the parameters is a few blocks of BLOCK_BYTES. Raises ValueError naming a
    tensor that is missing, left over or of another shape, before anything is read.
    """
    checkpoint = Checkpoint(directory)
    # A tied checkpoint may store the head as well; it is the embedding again.
    ignorable = frozenset({"lm_head.weight"}) if model.config.tied_head else frozenset()
    checkpoint.check(_full_shapes(model), ignorable)
    _fill(model, checkpoint.read, on_progress)


def init_weights(model: Transformer, *, seed: int = 0, std: float = 0.02) -> None:
    """Random weights, normal(0, std), norms at 1 and biases at 0, the same for every rank count."""

    def draw(placed: Placed, rows: Span, columns: Span | None) -> Iterator[tuple[int, Tensor]]:
        shape = [model.spans[dim].full for dim in placed.dims]
        if placed.source.endswith("bias"):
            full = torch.zeros(shape)
        elif columns is None:
            full = torch.ones(shape)
        else:
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(placed.source.encode()))
            full = torch.randn(shape, generator=generator) * std
        part = full[rows.start : rows.stop]
        yield 0, part if columns is None else part[:, columns.start : columns.stop]

    _fill(model, draw)


@torch.no_grad()
def _fill(
    model: Transformer,
    read: ReadFn,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    table = placements(model.config)
    parameters = dict(model.named_parameters())
    for done, (name, parts) in enumerate(table.items(), start=1):
        parameter = parameters.pop(name)
        first_row = 0
        for placed in parts:
            rows, *other = placed.spans(model.spans)
            columns = other[0] if other else None
            for offset, block in read(placed, rows, columns):
                start = first_row + offset
                parameter[start : start + block.shape[0]].copy_(block)
            first_row += rows.size
        parameter[first_row:].zero_()  # padding rows of the vocabulary
        if on_progress is not None:
            on_progress(done, len(table))
    assert not parameters, f"no placement for {sorted(parameters)}"


def _full_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    return {
        placed.source: tuple(model.spans[dim].full for dim in placed.dims)
        for parts in placements(model.config).values()
        for placed in parts
    }


def hf_state_dict(model: Transformer) -> dict[str, Tensor]:
    """Tensors under their Hugging Face names, for saving. Needs the whole model on one rank."""
    if model.parallel.size != 1:
        raise ValueError("a sharded model cannot be exported: load it in a single process")
    parameters = dict(model.named_parameters())
    tensors = {}
    for name, parts in placements(model.config).items():
        sizes = [placed.spans(model.spans)[0].size for placed in parts]
        for placed, part in zip(parts, parameters[name].detach().split(sizes), strict=True):
            tensors[placed.source] = part.contiguous()
    return tensors

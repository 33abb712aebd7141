"""Fill a model: from the tensors of files, each rank reading its own slices, or at random."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel.spans import Span, StoredTensor
from .model_files import ModelFiles
from .sharding import EMBED, HEAD, tensor_table
from .stored import Weights, named
from .transformer import Transformer

# (tensor of the checkpoint, rows start:stop of it, columns start:stop or all) -> that part
ReadFn = Callable[[StoredTensor, Span, Span | None], Iterator[tuple[int, Tensor]]]


def load_weights(
    model: Transformer,
    source: Weights | Path | str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill `model` from files, casting to the model's dtype.

    source: a directory in Hugging Face layout, a .gguf file, or what `ModelFiles.weights` returns.
    Peak memory beside the parameters is a few blocks of BLOCK_BYTES. Raises ValueError naming a
    tensor that is missing, left over or of another shape, before anything is read, and for a head
    that is stored beside the embedding that it is tied to and differs from it.
    """
    weights = ModelFiles(Path(source)).weights() if isinstance(source, str | Path) else source
    (embed,), (head,) = EMBED["embed.weight"], HEAD["head.weight"]
    is_stored = head.name in weights.shapes
    shapes = dict(weights.shapes)
    if model.config.tied_head and is_stored:
        shapes.pop(head.name)
    _check(shapes, _full_shapes(model), weights.origin)
    if model.config.tied_head and is_stored:
        _check_tied(model, weights, embed.name, head.name)
    _fill(model, lambda tensor, *part: weights.read(tensor.name, *part), on_progress)


def _check_tied(model: Transformer, weights: Weights, embed: str, head: str) -> None:
    """Raise ValueError where this rank's rows of a stored head are not the embedding's."""
    parts = [model.spans[dim] for dim in ("vocab", "d")]
    is_shaped = weights.shapes[head] == weights.shapes[embed]
    blocks = zip(*(weights.read(name, *parts) for name in (embed, head)), strict=True)
    if not is_shaped or not all(torch.equal(a, b) for (_, a), (_, b) in blocks):
        raise ValueError(
            f"{weights.origin}: config.json says tie_word_embeddings, but {head} is stored and is "
            f"not {embed}; engines differ about which counts: set tie_word_embeddings to false to "
            f"use {head}, or remove it"
        )


def _check(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], origin: str
) -> None:
    """Compare names and shapes with what the model needs. Raises ValueError naming a tensor."""
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise ValueError(f"{origin} lacks {named(missing)}")
    left_over = sorted(shapes.keys() - expected.keys())
    if left_over:
        raise ValueError(f"{origin} holds {named(left_over)}, which the model has no use for")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"tensor {name} of {origin} has shape {list(shapes[name])}, the config asks for "
                f"{list(shape)}"
            )


def init_weights(model: Transformer, *, seed: int = 0, std: float = 0.02) -> None:
    """Random weights, normal(0, std), norms at 1 and biases at 0, the same for every rank count."""

    def draw(
        tensor: StoredTensor, rows: Span, columns: Span | None
    ) -> Iterator[tuple[int, Tensor]]:
        shape = [model.spans[dim].full for dim in tensor.dims]
        if tensor.name.endswith("bias"):
            full = torch.zeros(shape)
        elif columns is None:
            full = torch.ones(shape)
        else:
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(tensor.name.encode()))
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
    table = tensor_table(model.config)
    parameters = dict(model.named_parameters())
    for done, (name, parts) in enumerate(table.items(), start=1):
        parameter = parameters.pop(name)
        parameter.zero_()  # padding stays so
        first_row = 0
        for tensor in parts:
            rows = tensor.spans(model.spans)[0]
            for part in _pieces(tensor, model.spans):
                target = parameter[first_row:]
                for offset, block in read(tensor, part.rows, part.columns):
                    _put(target, block, part.first_row + offset, part.first_column)
            first_row += rows.padded
        if on_progress is not None:
            on_progress(done, len(table))
    assert not parameters, f"no tensor fills {sorted(parameters)}"


class _Piece(NamedTuple):
    """Rows and columns of a tensor that lie together in a rank's parameter, and where."""

    rows: Span
    columns: Span | None
    first_row: int
    first_column: int


def _pieces(tensor: StoredTensor, spans: Mapping[str, Span]) -> Iterator[_Piece]:
    rows, *other = tensor.spans(spans)
    for start, stop, first_row in rows.stored:
        part = Span(start, stop, rows.full, stop - start)
        if not other:
            yield _Piece(part, None, first_row, 0)
            continue
        for first, last, first_column in other[0].stored:
            yield _Piece(
                part, Span(first, last, other[0].full, last - first), first_row, first_column
            )


def _put(target: Tensor, block: Tensor, first_row: int, first_column: int) -> None:
    rows = target[first_row : first_row + block.shape[0]]
    if block.dim() == 2:
        rows = rows[:, first_column : first_column + block.shape[1]]
    rows.copy_(block)


def _full_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    return {
        tensor.name: tuple(model.spans[dim].full for dim in tensor.dims)
        for parts in tensor_table(model.config).values()
        for tensor in parts
    }


def hf_state_dict(model: Transformer) -> dict[str, Tensor]:
    """Tensors under their Hugging Face names, for saving. Needs the whole model on one rank."""
    if model.parallel.size != 1:
        raise ValueError("a sharded model cannot be exported: load it in a single process")
    parameters = dict(model.named_parameters())
    tensors = {}
    for name, parts in tensor_table(model.config).items():
        sizes = [tensor.spans(model.spans)[0].size for tensor in parts]
        for tensor, part in zip(parts, parameters[name].detach().split(sizes), strict=True):
            tensors[tensor.name] = part.contiguous()
    return tensors

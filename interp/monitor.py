"""The lens of each layer while a model trains: an integer comparison on steps not looked at.

    monitor = LensMonitor(model, every=100, to="lens.jsonl")
    for step, (ids, labels) in enumerate(batches):
        with monitor.at(step, labels):
            loss = loss_of(model(ids), labels)
        loss.backward()

On a step that is looked at, states of some positions are copied, decoded by the model's norm and
head wherever these lie, and averaged over the ranks that hold other texts in one all-reduce. The
weights, gradients and random numbers of the training are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.arguments import integer, optional
from ..model.points import Layers, Tap
from ..parallel.collectives import reduce_over
from ..parallel.group import Axes
from ..parallel.layouts import whole_tensor
from .data_axes import data_ranks_of
from .decoders import Decoder
from .layer_sums import LayerMetrics, layer_sums
from .metrics_writers import OnMetrics, writer_of
from .unembedding import Unembedding
from .watch import Watch

POSITIONS = 256  # of a step, on each rank


class LensMonitor:
    """Metrics of some layers at every so many steps of a training; see `LayerMetrics`.

    model: of transformers, torchtitan or our own, on any layout that `Unembedding.of` reads. Make
    the monitor before the first step, from the compiled model where all of it is compiled. every:
    steps from one look to the next. layers: as in `LensSpec`; the last is always read, too.
    positions: how many are sampled of the texts of a step, on each rank. to: a function of
    `LayerMetrics`, a path that ends in .jsonl, or a TensorBoard writer; it is called on one rank.
    unembedding: where the model has no norm and head of its own, as on a stage of a pipeline; a
    stage that has none reports norms alone. seed: of the sample.

    Raises ValueError for what cannot be read, named as by `watch` and `Unembedding.of`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        layers: Layers = "all",
        positions: int = POSITIONS,
        to: OnMetrics | str | Path | Any,
        unembedding: Unembedding | None = None,
        seed: int = 0,
    ) -> None:
        self.every = integer(every, "every")
        self._positions, self._seed = integer(positions, "positions"), integer(seed, "seed")
        if self.every < 1 or self._positions < 1:
            raise ValueError("a monitor looks every 1 step or more, at 1 position or more")
        self._model, decoder = model, Decoder.of(model)
        if unembedding is None and decoder.norm is not None and decoder.head is not None:
            unembedding = Unembedding.of(model)
        self._unembedding = optional(
            unembedding, Unembedding, "unembedding", "an Unembedding, or none"
        )
        taps = decoder.taps("resid_post", layers)
        self._layers = [tap.layer for tap in taps]
        self._has_final = decoder.n_layers - 1 in decoder.blocks
        if self._has_final and decoder.n_layers - 1 not in self._layers:
            self._layers.append(decoder.n_layers - 1)
        self._data = data_ranks_of(model)
        self._write = writer_of(to)
        # code that is compiled as a whole sees only hooks that were there before it was
        self._lasting = _Sample(model, self._layers) if _is_compiled_whole(model) else None

    def at(self, step: int, targets: Tensor | None = None) -> AbstractContextManager[None]:
        """A context for the forward pass of a step, which is looked at if its turn has come.

        targets [B, T] int64: the token after each position, as the loss has it; those below 0 are
        not sampled. Without them there is no loss. Where several passes run in the context, the
        last counts. All ranks must enter it alike. Raises ValueError, at the end, for targets of
        another shape than the pass, and where no pass was seen.
        """
        if step % self.every:
            return _NOT_LOOKED_AT
        return self._looking(step, targets)

    @contextmanager
    def _looking(self, step: int, targets: Tensor | None) -> Iterator[None]:
        sample = self._lasting or _Sample(self._model, self._layers)
        generator = torch.Generator().manual_seed(((self._seed << 32) + step) % 2**63)
        sample.draw(self._positions, targets, generator)
        try:
            with sample:
                yield
            self._write_metrics(step, sample)
        finally:
            if sample is not self._lasting:
                sample.close()

    @torch.no_grad()
    def _write_metrics(self, step: int, sample: _Sample) -> None:
        states, targets = sample.stacked(), sample.targets  # [N, P, d], [N]
        with torch.autocast(states.device.type, enabled=False):
            read = None
            if self._unembedding is not None:
                read = self._unembedding.read(
                    states,
                    top_k=1,
                    targets=None if targets is None else targets[:, None].expand(states.shape[:2]),
                    kl_to_last=self._has_final,
                )
            norms = torch.stack([sample.norms[tap.layer] for tap in sample.taps])  # [P, B, T]
            sums = layer_sums(read, norms, has_final=self._has_final)
        sums = reduce_over(sums, self._data)
        if all(axis.rank == 0 for axis in (*self._data, *self._head_axes())):
            self._write(LayerMetrics.of(step, self._layers, sums))

    def _head_axes(self) -> Axes:
        return () if self._unembedding is None else self._unembedding.axes


_NOT_LOOKED_AT: AbstractContextManager[None] = nullcontext()


class _Sample(Watch):
    """Some rows of each layer's output [N, d], and the norms [B, T] of all of them."""

    def __init__(self, model: nn.Module, layers: list[int]) -> None:
        super().__init__(model, layers=layers)
        self.norms: dict[int, Tensor] = {}
        self.targets: Tensor | None = None  # [N], of the rows drawn
        self._shape: torch.Size | None = None
        self._count = 0
        self._rows: Tensor | None = None

    def draw(self, count: int, targets: Tensor | None, generator: torch.Generator) -> None:
        """Choose rows of the next passes: `count` of those with a target, if there are so many."""
        self._count, self._shape, self._rows, self.targets = count, None, None, None
        optional(targets, Tensor, "targets", "a tensor [B, T] of ids, or none")
        if targets is not None:
            flat = whole_tensor(targets).flatten()
            valid = (flat >= 0).nonzero()[:, 0]
            drawn = torch.randperm(len(valid), generator=generator)[:count].sort().values
            self._shape, self._rows = targets.shape, valid[drawn.to(valid.device)]
            self.targets = flat[self._rows]

    def begin(self) -> None:
        super().begin()
        self.norms = {}  # before each pass: compiled code would follow what grows

    def kept(self, tap: Tap, x: Tensor) -> Tensor:
        self.norms[tap.layer] = x.float().norm(dim=-1)
        n_rows, rows = x.shape[0] * x.shape[1], self._rows
        if self._shape is not None and self._shape != x.shape[:-1]:
            raise ValueError(
                f"targets of shape {list(self._shape)} for a pass of {list(x.shape[:-1])} tokens: "
                "give the token after each position of the pass that is looked at"
            )
        if rows is None:
            count = min(self._count, n_rows)
            rows = torch.arange(count, device=x.device) * n_rows // count
        return x.reshape(n_rows, -1)[rows]


def _is_compiled_whole(model: nn.Module) -> bool:
    trunk = Decoder.of(model).trunk
    return isinstance(model, torch._dynamo.OptimizedModule) or any(
        getattr(each, "_compiled_call_impl", None) is not None for each in (model, trunk)
    )

"""The final norm and the head of any model, on any layout: from states to statistics of logits.

    logits = W_U · norm_f(h)

Rows of W_U stay where they are. Each rank reduces the rows of the vocabulary that it holds to a few
candidates and sums per state, and one exchange gives every rank the exact, global answer (see
`reduce_head`). Where FSDP2 has split W_U over ranks that hold other texts, the states of all of
them are gathered first: P states of d numbers each, where the head has V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.rmsnorm_steer import rmsnorm_steer
from ..model.arguments import flag, integer, integers, number, of_kind, optional
from ..parallel.group import Axes, TensorParallel
from ..parallel.head_reduce import HeadResult, head_rows, reduce_head
from ..parallel.layouts import NO_MESH, check_slices, vocab_slice, whole_tensor
from ..parallel.vocab import Head
from .data_axes import data_axes_of
from .decoders import Decoder, norm_eps
from .state_exchange import StateExchange

Weights = tuple[Tensor, Tensor]
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True)
class Unembedding:
    """The final norm and this rank's part of the head; see `Unembedding.of`.

    weights: gives (the norm's weight, the head's weight) as they are at the time, since FSDP2 puts
    other tensors in their stead while a pass runs. slice_of: gives the head and the mesh axes that
    it is split over. data_axes: names of those along which ranks hold other states.
    """

    weights: Callable[[], Weights]
    slice_of: Callable[[Tensor], tuple[Head, tuple[str, ...]]]
    eps: float
    data_axes: Callable[[Tensor], tuple[str, ...]]

    @classmethod
    def of(
        cls,
        source: nn.Module | tuple[Tensor, float, Tensor],
        *,
        parallel: TensorParallel | None = None,
        first_id: int | None = None,
        vocab_size: int | None = None,
        data_axes: Sequence[str] | None = None,
    ) -> Unembedding:
        """The unembedding of a model, or of (norm's weight [d], epsilon, head's weight [V, d]).

        source: a `Transformer`; a LLaMA or Qwen model of transformers or torchtitan, plain, split
        by tensor parallelism or by FSDP2, or both; or bare weights, where the head may be a DTensor
        split over its rows, along any axes of its mesh. parallel, first_id: for a bare plain slice,
        the ranks that hold the others, in the order of ids, and the id of its first row (Megatron's
        layout). vocab_size: how many ids there are, where rows beyond them are padding.
        data_axes: names of the mesh axes along which ranks hold other texts; by default those over
        which FSDP2 has split the model.

        Raises ValueError naming a model or a layout that cannot be read exactly.
        """
        optional(parallel, TensorParallel, "parallel", "a TensorParallel, or none")
        first_id = None if first_id is None else integer(first_id, "first_id")
        vocab_size = None if vocab_size is None else integer(vocab_size, "vocab_size")
        if (first_id or 0) < 0 or (vocab_size is not None and vocab_size < 1):
            raise ValueError(f"first_id {first_id} of vocab_size {vocab_size}: no such ids")
        if isinstance(source, nn.Module):
            decoder = Decoder.of(source)
            norm, head = _read_parts(decoder)
            eps = norm_eps(norm)

            def weights() -> Weights:
                return norm.weight, head.weight  # type: ignore[return-value]

            if decoder.is_ours:
                return cls(weights, lambda _: (head, (NO_MESH,)), eps, lambda _: ())  # type: ignore
            found = data_axes_of(source, data_axes)
            size = _vocab_size(decoder, head) if vocab_size is None else vocab_size
        else:
            norm_weight, eps, head_weight = _bare(source)
            found = data_axes_of(None, data_axes)
            size = vocab_size

            def weights() -> Weights:
                return norm_weight, head_weight

        def slice_of(weight: Tensor) -> tuple[Head, tuple[str, ...]]:
            return vocab_slice(weight, parallel=parallel, first_id=first_id, vocab_size=size)

        made = cls(weights, slice_of, eps, found)
        first, names = slice_of(weights()[1])  # a layout that cannot be read is refused now
        if names == (NO_MESH,):
            check_slices(first)
        return made

    @property
    def vocab_size(self) -> int:
        """How many ids there are on all ranks together."""
        return self._head()[0].vocab.full

    @property
    def axes(self) -> Axes:
        """The axes over which the head is split at the moment."""
        return self._head()[0].axes

    def normed(self, states: Tensor) -> Tensor:
        """The final norm of states [..., d], in their dtype or the weight's, the wider one."""
        weight = whole_tensor(self.weights()[0]).detach()
        dtype = torch.promote_types(states.dtype, weight.dtype)
        return rmsnorm_steer(states.to(dtype), weight.to(dtype), self.eps)[0]

    @torch.no_grad()
    def read(
        self,
        states: Tensor,
        *,
        top_k: int = 5,
        targets: Tensor | None = None,
        kl_to_last: bool = False,
    ) -> HeadResult:
        """Exact global statistics of the logits of states [..., d]; fields are [...] or [..., k].

        targets [...] int64: ids whose log-prob and rank are wanted, -1 for none. kl_to_last: for
        states [..., P, d], KL from the last of each P to the others. Every rank that holds a part
        of the head must call it: with equal states, or along data axes with its own, of which there
        may be another number. Raises ValueError on every rank for states that differ where they
        must not, and for shapes that do not fit.
        """
        head, names = self._head()
        of_kind(states, Tensor, "states", "a tensor [..., d]")
        optional(targets, Tensor, "targets", "a tensor of ids, or none")
        if targets is not None and targets.dtype not in _WHOLE:
            raise ValueError(f"targets are {targets.dtype}: token ids are whole numbers")
        states = whole_tensor(states)
        d = head.weight.shape[1]
        if states.ndim < 2 or states.shape[-1] != d:
            raise ValueError(f"states of shape {list(states.shape)}: this head takes [..., {d}]")
        if targets is not None and targets.shape != states.shape[:-1]:
            raise ValueError(
                f"targets of shape {list(targets.shape)}: states of shape {list(states.shape)} "
                f"take {list(states.shape[:-1])}"
            )
        rows = states.detach().reshape(-1, d)
        ids = rows.new_full((len(rows),), -1, dtype=torch.int64)
        if targets is not None:
            ids = targets.reshape(-1).to(rows.device, torch.int64)
        per_request = states.shape[-2] if flag(kl_to_last, "kl_to_last") else 1
        others = StateExchange.of(rows, ids, head.axes, names, self.data_axes(self.weights()[1]))
        result = reduce_head(
            self.normed(others.gathered(rows)).to(head.weight.dtype),
            head,
            k=integer(top_k, "top_k"),
            target_ids=None if targets is None else others.gathered(ids),
            rows_per_request=per_request,
        ).rows(others.mine(len(rows)))
        return _shaped(result, states.shape[:-1])

    def head_row(self, token_id: int) -> Tensor:
        """Row [d] of W_U of any id, the same on every rank, all of which must ask for it."""
        return self.head_rows([integer(token_id, "token_id")])[0]

    @torch.no_grad()
    def head_rows(self, token_ids: Sequence[int]) -> Tensor:
        """Rows [n, d] of W_U of any ids, in the weight's dtype; see `head_row`.

        Raises ValueError for an id outside the vocabulary.
        """
        head, _ = self._head()
        ids = integers(token_ids, "token_ids")
        if not ids:
            raise ValueError("no token id is given: name at least one")
        for token_id in ids:
            if not 0 <= token_id < head.vocab.full:
                raise ValueError(
                    f"token {token_id} is outside the vocabulary of {head.vocab.full} ids"
                )
        return head_rows(head, torch.tensor(ids, device=head.weight.device))

    def _head(self) -> tuple[Head, tuple[str, ...]]:
        return self.slice_of(self.weights()[1])


def _shaped(result: HeadResult, shape: torch.Size) -> HeadResult:
    values: dict[str, Any] = {
        name: value.unflatten(0, shape) for name, value in vars(result).items() if value is not None
    }
    return replace(result, **values)


def _read_parts(decoder: Decoder) -> tuple[nn.Module, nn.Module]:
    if decoder.norm is None or decoder.head is None:
        raise ValueError("this stage of a pipeline has no final norm or head: read on the last one")
    return decoder.norm, decoder.head


def _vocab_size(decoder: Decoder, head: nn.Module) -> int | None:
    """How many ids a model's config says, so that a plain slice is not taken for the whole."""
    size = getattr(getattr(decoder.model, "config", None), "vocab_size", None)
    weight = head.weight
    assert isinstance(weight, Tensor)
    rows = weight.shape[0]
    if isinstance(size, int) and rows < size:
        raise ValueError(
            f"the head has {rows} of the {size} rows of its config: this rank's part is a plain "
            "tensor, which does not say which; give (norm's weight, epsilon, head's weight), "
            "first_id, vocab_size and parallel"
        )
    return size if isinstance(size, int) else None


def _bare(source: Any) -> tuple[Tensor, float, Tensor]:
    if not isinstance(source, tuple) or len(source) != 3:
        raise ValueError(
            f"an unembedding of {type(source).__name__}: give a model, or (the norm's weight, "
            "epsilon, the head's weight)"
        )
    norm = of_kind(source[0], Tensor, "the norm's weight", "a tensor [d]")
    head = of_kind(source[2], Tensor, "the head's weight", "a tensor [V, d]")
    eps = number(source[1], "the norm's epsilon")
    if norm.ndim != 1 or head.shape[-1:] != norm.shape:
        raise ValueError(
            f"a norm's weight {list(norm.shape)} and a head's {list(head.shape)}: give [d], [V, d]"
        )
    if not (norm.is_floating_point() and head.is_floating_point()) or eps < 0:
        raise ValueError("an unembedding is of float weights, and of an epsilon from 0 on")
    return norm, eps, head

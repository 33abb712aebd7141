"""Edits of the states of a model that somebody else made, while it runs; vectors can be trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ..engine.steering import MOST_POSITIONS, Steering
from ..engine.vectors import SteeringVectors
from ..kernels.edits import MODES, Edits, edit_reference
from ..model.arguments import all_of, integer
from ..model.fields import shown
from ..model.points import Tap
from ..model.tap_edits import TapEdits
from .decoders import Decoder
from .hooks import install

_OF_A_PROMPT = ("prompt", "generated", "last_prompt", "label")


@contextmanager
def steered(
    model: nn.Module,
    steering: Steering | Sequence[Steering],
    *,
    prompt_length: int | None = None,
) -> Iterator[None]:
    """Edit states of a model of transformers, torchtitan or our own while a block runs.

    steering: as for `LanguageModel.generate`; edits that meet act in the order of the list.
    Positions are absolute, those that the model itself gives its tokens (position_ids), so that a
    step with a cache and a text that is padded on the left are edited where they should be.
    prompt_length: of every text, for edits of the prompt or of what follows it.

    Gradients flow to a vector and to a scale that require them; on ranks of tensor parallelism each
    gets the whole gradient. resid_mid is edited by changing attn_out, which rounds once more. Under
    torch.compile what `watch` says holds; recomputed blocks are edited as they were.

    At the end every hook is removed, whatever happened. Raises ValueError for a model that is not
    known, for edits of another depth or width, and where no pass was edited, since compiled code
    passed the hooks by.
    """
    edits = _Editor(Decoder.of(model), all_of(steering, Steering, "steering", "Steering objects"))
    edits.check(prompt_length)
    hooks = install(edits.decoder, edits.by_tap, edits, edits.table)
    try:
        yield
        edits.check_reached()
    finally:
        edits.is_open = False
        hooks.close()


class _Editor:
    """The edits of a pass, by tap; see `Visitor`."""

    def __init__(self, decoder: Decoder, steerings: Sequence[Steering]) -> None:
        if not steerings:
            raise ValueError("steering is an empty list: give at least one edit")
        self.decoder, self.is_open = decoder, True
        self.by_tap: dict[Tap, list[Steering]] = {}
        for each in steerings:
            vectors = each.vector
            if isinstance(vectors, SteeringVectors) and vectors.n_layers != decoder.n_layers:
                raise ValueError(
                    f"the steering vectors are for a model of {vectors.n_layers} layers, this one "
                    f"has {decoder.n_layers}"
                )
            for tap in each.taps(decoder.n_layers):
                self.by_tap.setdefault(self._one_name(tap), []).append(each)
        self.prompt_length = 0
        self.positions: Tensor | None = None
        # filled before any pass, for compiled code would follow what grows
        self.reached = dict.fromkeys(self.by_tap, False)
        device = next(decoder.model.parameters()).device
        self.vectors = {
            tap: [each.vector_at(tap).to(device) for each in steerings]
            for tap, steerings in self.by_tap.items()
        }

    def _one_name(self, tap: Tap) -> Tap:
        """The name of a residual by the block before, if it is here: edits of both names meet."""
        before = Tap(tap.layer - 1, "resid_post")
        return before if tap.point == "resid_pre" and before.layer in self.decoder.blocks else tap

    def check(self, prompt_length: int | None) -> None:
        for tap, steerings in self.by_tap.items():
            if tap.layer not in self.decoder.blocks:
                raise ValueError(f"layer {tap.layer} is on another stage of the pipeline")
            for each in steerings:
                if each.positions in _OF_A_PROMPT and prompt_length is None:
                    raise ValueError(
                        f"an edit at positions {each.positions} needs prompt_length, the number of "
                        "tokens of every prompt"
                    )
        if prompt_length is not None:
            self.prompt_length = integer(prompt_length, "prompt_length")
            if not 1 <= self.prompt_length <= MOST_POSITIONS:
                raise ValueError(f"prompt_length is {shown(prompt_length)}: a prompt has 1 or more")

    def check_reached(self) -> None:
        missing = [tap for tap, is_reached in self.reached.items() if not is_reached]
        if missing:
            raise ValueError(
                f"nothing was edited at {missing[0].point} of layer {missing[0].layer}: either no "
                "pass ran, or the model was compiled before it was steered"
            )

    def begin(self) -> None:
        self.positions = None

    def end(self) -> None:
        pass

    def call(self, positions: Tensor | None) -> None:
        self.positions = positions

    def visit(self, tap: Tap, x: Tensor) -> Tensor | None:
        if not self.is_open:
            return None
        self.reached[tap] = True
        if isinstance(x, DTensor):
            mesh, placements = x.device_mesh, x.placements
            copies = [Replicate()] * mesh.ndim
            edited = self._edited(tap, x.redistribute(placements=copies).to_local())
            return DTensor.from_local(edited, mesh, copies).redistribute(placements=placements)
        return self._edited(tap, x)

    def _edited(self, tap: Tap, x: Tensor) -> Tensor:
        positions = self.positions
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        rows = x.reshape(-1, x.shape[-1])
        for edit in self.edits_at(tap, positions.expand(x.shape[:2]), rows):
            rows = edit_reference(rows, edit)
        return rows.view_as(x)

    def edits_at(self, tap: Tap, positions: Tensor, like: Tensor) -> tuple[Edits, ...]:
        """The edits at a tap of tokens at positions [B, T], for rows [B * T, d] such as `like`."""
        made = []
        for each, vector in zip(self.by_tap[tap], self.vectors[tap], strict=True):
            if vector.numel() != like.shape[-1]:
                raise ValueError(
                    f"the steering vector at {tap.point} of layer {tap.layer} has "
                    f"{vector.numel()} numbers, the model's states {like.shape[-1]}"
                )
            reached = each.reaches(positions.flatten(), self.prompt_length)
            scale = torch.as_tensor(each.scale_at(tap), dtype=torch.float32, device=like.device)
            made.append(
                Edits(
                    vectors=vector[None],
                    modes=torch.tensor(
                        [MODES.index(each.mode)], dtype=torch.int32, device=like.device
                    ),
                    index=reached.to(torch.int64) - 1,
                    scale=scale.expand(len(reached)),
                )
            )
        return tuple(made)

    def table(self, positions: Tensor) -> TapEdits:
        """The edits of a pass of a `Transformer`, by canonical tap."""
        weight = self.decoder.model.get_parameter("norm.weight")
        found: dict[Tap, tuple[Edits, ...]] = {}
        for tap in self.by_tap:
            edits = self.edits_at(tap, positions, weight[None])
            found[tap.canonical] = (*found.get(tap.canonical, ()), *edits)
            self.reached[tap] = True
        return TapEdits(found)

"""The arms of `bench end-to-end` that are shardlens: without lens, with it, and steered too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.generation import generate_tokens
from ..engine.lens_spec import LensSpec
from ..engine.sampling import Sampling
from ..engine.steering import Steering
from ..interp.lens import LensRecorder
from ..model.transformer import Transformer
from .baselines import ArmOutput, OnToken

STEERED_POINT = "mlp_norm"
STEERING_SCALE = 1.0


@dataclass(frozen=True)
class OwnArm:
    """Greedy generation; every block's resid_post is read live where there is a lens."""

    model: Transformer
    lens: bool = False
    steering: Sequence[Steering] = ()

    def run(
        self,
        prompt: list[int],
        max_new_tokens: int,
        top_k: int,
        on_token: OnToken | None = None,
    ) -> ArmOutput:
        spec = LensSpec(top_k=top_k, targets=None, positions="generated")
        sequences = [list(prompt)]
        recorder = LensRecorder(self.model, spec, sequences) if self.lens else None
        generate_tokens(
            self.model,
            sequences,
            max_new_tokens=max_new_tokens,
            samplings=[Sampling()],
            steerings=[self.steering],
            observer=recorder,
            on_token=None if on_token is None else lambda request, token: on_token(token),
        )
        new = sequences[0][len(prompt) :]
        if recorder is None:
            return ArmOutput(new, None, None)
        trace = recorder.finish()[0]
        return ArmOutput(new, trace.token_ids, trace.logprobs)


def random_steering(model: Transformer) -> list[Steering]:
    """One random vector, as long as a normed row, added at the MLP's input of all layers."""
    generator = torch.Generator().manual_seed(0)
    vector: Tensor = torch.randn(model.config.d, generator=generator)
    return [
        Steering(vector, point=STEERED_POINT, scale=STEERING_SCALE, positions="generated"),
    ]

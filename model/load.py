"""From a model's files to a Transformer that holds this rank's share of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..parallel.agreement import waiting_long
from ..parallel.collectives import agreed
from ..parallel.group import TensorParallel, default_device_type
from .model_files import ModelFiles
from .transformer import Transformer
from .weights import load_weights


def load_model(
    files: ModelFiles,
    *,
    parallel: TensorParallel,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Transformer:
    """The model of some files, ready to run and without gradients.

    dtype: default the checkpoint's. device: default this rank's CUDA device where there is one.
    on_progress(done, total) counts parameters filled. If any rank fails, every rank raises:
    ValueError for whatever is wrong with the files.
    """
    with waiting_long(parallel), agreed(parallel):
        config, weights = files.config, files.weights()
        model = Transformer(config, parallel=parallel, dtype=dtype or config.dtype, device="meta")
        model.to_empty(device=default_device() if device is None else torch.device(device))
        load_weights(model, weights, on_progress=on_progress)
    return model.eval().requires_grad_(False)


def default_device() -> torch.device:
    """This rank's CUDA device where there is one, else the CPU."""
    if default_device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())

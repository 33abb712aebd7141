"""Steered models from outside: transformers moved by hooks, one text at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardlens.engine import Steering, SteeringVectors
from shardlens.engine.edit_table import EditTable, RequestEdits, TableShape
from shardlens.model import EditFn, Tap, Transformer, load_weights, read_config
from shardlens.parallel import TensorParallel

IDS = torch.randint(3, 509, (19,), generator=torch.Generator().manual_seed(7)).tolist()
N_PROMPT = 11
POSITIONS: dict[Any, list[int]] = {
    "all": list(range(19)),
    "prompt": list(range(11)),
    "generated": list(range(10, 19)),
    "last_prompt": [10],
    "label": [11],
    5: list(range(5, 19)),
    (0, 3, 12): [0, 3, 12],
}
SCALE = {"add": 0.8, "ablate": 1.0, "clamp": 3.0, "add_keep_norm": 2.0}


def edited(x: Tensor, v: Tensor, mode: str, s: float) -> Tensor:
    """The definitions of kernels/edits.py, written out."""
    u = v / v.norm()
    along = (x @ u)[..., None]
    if mode == "add":
        return x + s * v
    if mode == "ablate":
        return x - s * along * u
    if mode == "clamp":
        return x + (s - along) * u
    moved = x + s * v
    return moved * x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)


def load(directory: Path, parallel: TensorParallel) -> Transformer:
    model = Transformer(read_config(directory), parallel=parallel)
    load_weights(model, directory)
    return model.eval().requires_grad_(False)


def hook_for(layer: Any, point: str, change: Callable[[Tensor], Tensor]) -> Callable[[], list[Any]]:
    """Registers hooks on one decoder layer of transformers that change the state at `point`."""
    moved: dict[str, Tensor] = {}

    def on_input(module: Any, args: Any, kwargs: Any) -> Any:
        return ((change(args[0]), *args[1:]), kwargs)

    def on_output(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def mid_in(module: Any, args: Any) -> Any:  # the norm reads it, the residual must follow
        moved["by"] = change(args[0]) - args[0]
        return (args[0] + moved["by"],)

    def mid_out(module: Any, args: Any, output: Any) -> Any:
        return output + moved["by"]

    return {
        "resid_pre": lambda: [layer.register_forward_pre_hook(on_input, with_kwargs=True)],
        "attn_norm": lambda: [layer.input_layernorm.register_forward_hook(on_output)],
        "attn_out": lambda: [layer.self_attn.register_forward_hook(on_output)],
        "resid_mid": lambda: [
            layer.post_attention_layernorm.register_forward_pre_hook(mid_in),
            layer.register_forward_hook(mid_out),
        ],
        "mlp_norm": lambda: [layer.post_attention_layernorm.register_forward_hook(on_output)],
        "mlp_out": lambda: [layer.mlp.register_forward_hook(on_output)],
        "resid_post": lambda: [layer.register_forward_hook(on_output)],
    }[point]


@torch.no_grad()
def oracle(hf: Any, edits: list[Steering]) -> Tensor:
    """Log-probs [T, V] of the whole text in float64, edits of one tap in the list's order."""
    hf.double()
    by_tap: dict[Tap, list[Steering]] = {}
    for steering in edits:
        assert not isinstance(steering.layers, str) and steering.point is not None
        for layer in steering.layers:
            tap = Tap(layer, steering.point)
            if tap.point == "resid_pre" and layer:
                tap = Tap(layer - 1, "resid_post")
            by_tap.setdefault(tap, []).append(steering)

    def change_of(steerings: list[Steering]) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            for steering in steerings:
                inside = torch.zeros(len(IDS), 1, dtype=torch.bool)
                inside[POSITIONS[steering.positions]] = True
                assert isinstance(steering.vector, Tensor)
                new = edited(x, steering.vector.double(), steering.mode, steering.scale)
                x = torch.where(inside, new, x)
            return x

        return change

    handles = [
        handle
        for tap, steerings in by_tap.items()
        for handle in hook_for(hf.model.layers[tap.layer], tap.point, change_of(steerings))()
    ]
    try:
        return hf(torch.tensor([IDS]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


def edits_of(
    model: Transformer, steering: Sequence[Steering], prompt_length: int, capacity: int
) -> EditFn | None:
    """The edits of one request, as a forward pass takes them."""
    edits = RequestEdits(steering, prompt_length, capacity, model.config.n_layers)
    shape = TableShape.of([edits])
    if shape is None:
        return None
    table = EditTable(
        model.config, shape, 1, capacity, dtype=model.dtype, device=model.device, every_site=False
    )
    table.put(0, edits)
    return table.at


def forced(model: Transformer, steering: list[Steering]) -> Tensor:
    """Log-probs [T, V] of the text: N_PROMPT tokens in chunks, the rest decoded with a cache."""
    cache = model.new_cache(1, len(IDS))
    edits = edits_of(model, steering, N_PROMPT, len(IDS))
    ids = torch.tensor([IDS])
    parts = [ids[:, :4], ids[:, 4:N_PROMPT], *ids[:, N_PROMPT:].split(1, dim=1)]
    with torch.no_grad():
        hidden = torch.cat([model(part, cache=cache, edits=edits) for part in parts], 1)
        logits = model.norm(hidden)[0] @ model.head.weight.T
    return logits.double().log_softmax(-1)


def miss(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def direction(seed: int) -> Tensor:
    """With much in common: of orthogonal ones many orders would come to the same."""
    common, rest = (
        torch.randn(48, generator=torch.Generator().manual_seed(number)) for number in (0, seed)
    )
    return 0.5 * common + rest


def vectors_at(*layers_and_points: tuple[int, str], norm: float | None = 7.0) -> SteeringVectors:
    """A vector and a norm of the states for each of some (layer, point)."""
    taps = [Tap(layer, point) for layer, point in layers_and_points]
    return SteeringVectors(
        {tap: direction(10 + number) for number, tap in enumerate(taps)},
        {} if norm is None else {tap: norm + number for number, tap in enumerate(taps)},
        n_layers=3,
    )


def edit_table(
    requests: Sequence[tuple[Sequence[Steering], int]], capacity: int, model: Transformer
) -> EditTable:
    """The edits of requests, each with its prompt's length, one per slot."""
    n_layers = model.config.n_layers
    edits = [RequestEdits(*request, capacity, n_layers) for request in requests]
    shape = TableShape.of(edits)
    assert shape is not None
    table = EditTable(
        model.config,
        shape,
        len(requests),
        capacity,
        dtype=model.dtype,
        device=model.device,
        every_site=False,
    )
    for slot, request in enumerate(edits):
        table.put(slot, request)
    return table

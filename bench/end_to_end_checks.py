"""The answers of the runs of `bench end-to-end`, compared before anything is timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.transformer import Transformer
from .baselines import RunOutput
from .end_to_end_runs import (
    LENS,
    ORACLE,
    PLAIN,
    STEERED,
    STEERED_POINT,
    UNCACHED,
    Run,
    random_steering,
)
from .shared_weights import as_transformers

# Nats by which log-probs may differ, and within which two ids may change places. A half dtype
# rounds every state on its way through the layers, and other kernels round it elsewhere.
NATS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def problems(
    model: Transformer,
    runs: dict[str, Run],
    prompt: list[int],
    n_tokens: int,
    top_k: int,
) -> dict[str, list[str]]:
    """The problems of each run whose answers are wrong; empty where all is well.

    Each is held against transformers, where that is among the runs. A lens that changes the text
    is said of both runs that differ.
    """
    nats = NATS[model.dtype]
    found: dict[str, list[str]] = {}
    answers = {
        name: run(prompt, n_tokens_of(name, n_tokens), top_k, None) for name, run in runs.items()
    }
    for name, answer in answers.items():
        if ORACLE not in answers or name in (ORACLE, PLAIN, STEERED):
            continue
        if difference := disagreement(answers[ORACLE], answer, nats):
            found.setdefault(name, []).append(difference)
    ours, plain, steered = (answers.get(name) for name in (LENS, PLAIN, STEERED))
    if ours is not None and plain is not None and plain.token_ids != ours.token_ids:
        for name in (PLAIN, LENS):
            found.setdefault(name, []).append("the lens changes the text")
    if steered is not None:
        moved = ours is None or steered.token_ids != ours.token_ids
        if ours is not None and not moved and _largest_gap(steered, ours) <= nats:
            found.setdefault(STEERED, []).append("steering has no effect")
        if model.parallel.size == 1:
            hooked = steered_by_hooks(model, prompt, steered, top_k)
            if difference := disagreement(steered, hooked, nats):
                found.setdefault(STEERED, []).append(f"steering against hooks: {difference}")
    return found


def n_tokens_of(name: str, n_tokens: int) -> int:
    """A baseline without cache is checked on two tokens: it takes seconds for each."""
    return 2 if name in UNCACHED else n_tokens


def disagreement(expected: RunOutput, found: RunOutput, nats: float) -> str | None:
    """Where top-1 ids or log-probs differ by more than rounding explains, up to the first token
    that a near tie turned.
    """
    assert expected.lens_ids is not None and expected.lens_logprobs is not None
    assert found.lens_ids is not None and found.lens_logprobs is not None
    pairs = zip(expected.token_ids, found.token_ids, strict=False)
    for step, (expected_token, found_token) in enumerate(pairs):
        logprobs = expected.lens_logprobs[step]  # [L, k]
        margin = logprobs[:, 0] - logprobs[:, 1]
        differs = expected.lens_ids[step, :, 0] != found.lens_ids[step, :, 0]
        clear = differs & (margin > 2 * nats)
        if clear.any():
            return f"top-1 of new token {step} at layer {int(clear.nonzero()[0])}"
        gap = (logprobs[:, 0] - found.lens_logprobs[step, :, 0]).abs().max()
        if gap > nats:
            return f"log-probs of new token {step} differ by {float(gap):.3g} nats"
        if expected_token != found_token:
            return None if margin[-1] <= 2 * nats else f"new token {step}"
    return None


def _largest_gap(a: RunOutput, b: RunOutput) -> float:
    assert a.lens_logprobs is not None and b.lens_logprobs is not None
    return float((a.lens_logprobs[:, -1] - b.lens_logprobs[:, -1]).abs().max())


@torch.inference_mode()
def steered_by_hooks(
    model: Transformer, prompt: list[int], steered: RunOutput, top_k: int
) -> RunOutput:
    """The steered text as transformers reads it, its MLP inputs moved by hooks at new tokens."""
    assert STEERED_POINT == "mlp_norm"
    edit = random_steering(model)[0]
    assert isinstance(edit.vector, Tensor)
    hf = as_transformers(model)
    ids = torch.tensor([[*prompt, *steered.token_ids[:-1]]], device=model.device)
    move = edit.scale * edit.vector.to(model.device, model.dtype)
    states: list[Tensor] = []

    def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, len(prompt) :] += move
        return output

    def keep(module: Any, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = []
    for layer in hf.model.layers:
        hooks.append(layer.post_attention_layernorm.register_forward_hook(add))
        hooks.append(layer.register_forward_hook(keep))
    try:
        hf.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    rows = torch.stack([state[0, len(prompt) - 1 :] for state in states], 1)  # [T_new, L, d]
    logprobs = hf.lm_head(hf.model.norm(rows)).float().log_softmax(-1)
    best = logprobs.topk(top_k)
    return RunOutput(steered.token_ids, best.indices.cpu(), best.values.cpu())

"""The two main verbs: run a model with a lens on it, over a text or while it generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .engine.generation import OnProgress, OnToken, generate_tokens
from .engine.lens_spec import LensSpec
from .engine.sampling import Sampling
from .engine.steering import Steering
from .interp.lens import LensRecorder, OnLens
from .interp.trace import Trace
from .model.points import Layers
from .model.transformer import Transformer

Prompt = str | Sequence[int] | Tensor


@dataclass
class Result:
    """One generated continuation: its new tokens, their text, and the lens if one was asked for."""

    token_ids: list[int]
    text: str | None  # None where the model has no tokenizer
    stopped: bool  # by a stop token, rather than by max_new_tokens
    trace: Trace | None = None


def lens(
    model: Transformer,
    token_ids: Prompt,
    *,
    points: Sequence[str] = ("resid_post",),
    layers: Layers = "all",
    top_k: int = 5,
    targets: Literal["next"] | int | None = "next",
    positions: str = "all",
    steering: Sequence[Steering] = (),
    on_progress: OnProgress | None = None,
) -> Trace:
    """What each layer would have predicted at each position of a text.

    token_ids: ids as a sequence or [T] tensor, or text if the model has a tokenizer. steering:
    edits to read the model under. The other arguments are those of `LensSpec`. Every rank gets
    the same Trace. Raises ValueError for an empty or too long text and for points, layers or
    targets the model does not have.
    """
    spec = LensSpec(points, layers, top_k, targets, positions)
    ids = to_ids(model, token_ids)
    result = generate(
        model, ids, max_new_tokens=0, lens=spec, steering=steering, on_progress=on_progress
    )
    assert isinstance(result, Result) and result.trace is not None
    return result.trace


def generate(
    model: Transformer,
    token_ids: Prompt | Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | Sequence[Sampling] | None = None,
    lens: LensSpec | None = None,
    steering: Sequence[Steering] | Sequence[Sequence[Steering]] = (),
    stop_ids: Sequence[int] | None = None,
    on_token: OnToken | None = None,
    on_lens: OnLens | None = None,
    on_progress: OnProgress | None = None,
    capture: bool = True,
) -> Result | list[Result]:
    """Continue one prompt, or a list of prompts as one batch (which gives a list of results).

    A prompt is token ids, or text if the model has a tokenizer. sampling: one for all or one per
    prompt, greedy by default; prompts with equal seeds share their noise. steering: edits of all
    prompts, or a list of edits for each. stop_ids default to the model's own end tokens.
    on_token(request, id) is called as soon as a token is known, on_progress(positions fed, most)
    after every forward pass. on_lens(request, piece) is called with a Trace of each newly read
    position or block of positions; what is handed over is not kept, so that memory stays flat
    however long the text, and the results have no trace. The last new token is not fed back to
    the model, so a lens ends at the position before it. On CUDA, decode steps are captured as
    graphs unless capture is off. Every rank gets the same results. Raises ValueError for an empty
    prompt, one that with max_new_tokens exceeds the context, and edits that do not fit the model.
    """
    prompts, is_batch = _prompts(model, token_ids)
    chosen = sampling if sampling is not None else Sampling()
    samplings = [chosen] * len(prompts) if isinstance(chosen, Sampling) else list(chosen)
    if len(samplings) != len(prompts):
        raise ValueError(f"{len(samplings)} samplings for {len(prompts)} prompts: give one each")
    if on_lens is not None and lens is None:
        raise ValueError("on_lens is given, but no lens")
    stop = frozenset(model.config.eos_token_ids if stop_ids is None else stop_ids)
    sequences = [list(prompt) for prompt in prompts]
    recorder = None if lens is None else LensRecorder(model, lens, sequences, on_lens)
    generate_tokens(
        model,
        sequences,
        max_new_tokens=max_new_tokens,
        samplings=samplings,
        stop_ids=stop,
        steerings=_edits_of_each(steering, len(prompts)),
        observer=recorder,
        on_token=on_token,
        on_progress=on_progress,
        capture=capture,
    )
    keeps_trace = recorder is not None and on_lens is None
    traces = recorder.finish() if recorder is not None and keeps_trace else [None] * len(prompts)
    results = [
        _result(model, sequence[len(prompt) :], stop, trace)
        for prompt, sequence, trace in zip(prompts, sequences, traces, strict=True)
    ]
    return results if is_batch else results[0]


def _edits_of_each(
    steering: Sequence[Steering] | Sequence[Sequence[Steering]], n_prompts: int
) -> list[list[Steering]]:
    if all(isinstance(edit, Steering) for edit in steering):
        return [[edit for edit in steering if isinstance(edit, Steering)]] * n_prompts
    each = [list(own) for own in steering if not isinstance(own, Steering)]
    if len(each) != len(steering) or len(each) != n_prompts:
        raise ValueError(
            f"steering is neither a list of edits nor {n_prompts} of them, one for each prompt"
        )
    return each


def _result(
    model: Transformer, new: list[int], stop: frozenset[int], trace: Trace | None
) -> Result:
    tokenizer = model.tokenizer
    text = None
    if tokenizer is not None:
        stream = tokenizer.stream()
        text = "".join(stream.push(token) for token in new) + stream.flush()
        if trace is not None:
            trace.name_tokens(tokenizer.token_text)
    return Result(new, text, bool(new) and new[-1] in stop, trace)


def to_ids(model: Transformer, prompt: Prompt) -> list[int]:
    """Token ids of one prompt."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: give token ids instead of text")
        return model.tokenizer.encode(prompt)
    ids = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
    if ids and not isinstance(ids[0], int):
        raise ValueError("token ids of one text are a flat sequence of integers")
    return ids


def _prompts(
    model: Transformer, given: Prompt | Sequence[str] | Sequence[Sequence[int]]
) -> tuple[list[list[int]], bool]:
    """A list of prompts as ids, and whether a batch was given."""
    is_batch = (
        not isinstance(given, str | Tensor) and bool(len(given)) and not isinstance(given[0], int)
    )
    batch = given if is_batch else [given]
    return [to_ids(model, prompt) for prompt in batch], is_batch  # type: ignore[arg-type]

"""A model and its tokenizer together, for users to load and call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeGuard, Unpack, overload

import torch
from torch import Tensor

from .engine.engine import Engine
from .engine.lens_spec import LensSpec
from .engine.request import (
    Conversation,
    FinishReason,
    Generation,
    OnProgress,
    OnToken,
    Prompt,
    Request,
)
from .engine.sampling import GREEDY, Sampling
from .engine.steering import Steering
from .engine.vectors import SteeringVectors
from .interp.extract import extract
from .interp.labels import PromptForm
from .interp.pairs import Pair
from .interp.report import SteerabilityReport
from .interp.slopes import MULTIPLIERS
from .interp.steerability import steerability
from .interp.trace import Trace
from .model.arguments import is_integer
from .model.load import load_model
from .model.points import Layers
from .model.source import find_model
from .model.summary import one_line
from .model.transformer import Transformer
from .parallel.collectives import agreed
from .parallel.group import TensorParallel
from .stop_text import ends_at, stop_texts, text_of
from .tokenizer.tokenizer import Tokenizer

# several prompts of one kind
Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor] | Sequence[Conversation]
# (number of the prompt, a Trace of its newly read positions)
OnLens = Callable[[int, Trace], None]


@dataclass
class Result:
    """The continuation of one prompt.

    token_ids: the new tokens. text: theirs, up to the first stop text; None where there is no
    tokenizer. finish_reason: "stop" after a stop token or text, "length" after max_new_tokens.
    trace: what the lens read, if one was asked for and not streamed.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason | None
    trace: Trace | None = None

    __repr__ = one_line


class LensOptions(TypedDict, total=False):
    """The options of `LanguageModel.lens`, for its overloads."""

    points: str | Sequence[str]
    layers: Layers
    top_k: int
    targets: str | int | None
    positions: str
    steering: Steering | Sequence[Steering]
    max_batch: int | None
    on_progress: OnProgress | None


class GenerateOptions(TypedDict, total=False):
    """The options of `LanguageModel.generate`, for its overloads."""

    max_new_tokens: int
    sampling: Sampling
    lens: LensSpec | None
    steering: Steering | Sequence[Steering]
    stop_ids: Collection[int] | None
    stop: str | Sequence[str]
    max_batch: int | None
    on_token: OnToken | None
    on_lens: OnLens | None
    on_progress: OnProgress | None
    capture: bool


class LanguageModel:
    """A model to read, steer and continue texts with. See `shardlens.load`.

    model: an nn.Module, which holds this rank's weights. tokenizer: None where prompts are token
    ids. Under several ranks, every rank makes the same calls and gets the same answers.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._engine = Engine(model)

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back. Raises ValueError for a model that came without one."""
        if self._tokenizer is None:
            raise ValueError("the model has no tokenizer: give token ids instead of text")
        return self._tokenizer

    @overload
    def lens(  # type: ignore[overload-overlap]  # text is a sequence of text, and one prompt
        self, prompt: Prompt, **options: Unpack[LensOptions]
    ) -> Trace: ...

    @overload
    def lens(self, prompt: Prompts, **options: Unpack[LensOptions]) -> list[Trace]: ...

    def lens(
        self,
        prompt: Prompt | Prompts,
        *,
        points: str | Sequence[str] = ("resid_post",),
        layers: Layers = "all",
        top_k: int = 5,
        targets: str | int | None = "next",
        positions: str = "all",
        steering: Steering | Sequence[Steering] = (),
        max_batch: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> Trace | list[Trace]:
        """The predictions of each layer at each position of a text.

        prompt: text, token ids or a conversation (see `generate`), which gives one trace, or a
        list of them, which gives a list. steering: edits to read the model under. targets: "next",
        a token id, or the text of one token. The others are those of `LensSpec`. Raises ValueError
        for an empty or too long text and for points, layers or targets the model does not have.
        """
        spec = LensSpec(points, layers, top_k, self._target(targets), positions)
        prompts, is_one = _prompts(prompt)
        requests = [Request(each, 0, steering=steering, lens=spec) for each in prompts]
        results = self._run(requests, max_batch=max_batch, on_progress=on_progress)
        traces = [result.trace for result in results if result.trace is not None]
        return traces[0] if is_one else traces

    @overload
    def generate(  # type: ignore[overload-overlap]  # text is a sequence of text, and one prompt
        self, prompt: Prompt | Request, **options: Unpack[GenerateOptions]
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: Prompts | Sequence[Request],
        **options: Unpack[GenerateOptions],
    ) -> list[Result]: ...

    def generate(
        self,
        prompt: Prompt | Request | Prompts | Sequence[Request],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        lens: LensSpec | None = None,
        steering: Steering | Sequence[Steering] = (),
        stop_ids: Collection[int] | None = None,
        stop: str | Sequence[str] = (),
        max_batch: int | None = None,
        on_token: OnToken | None = None,
        on_lens: OnLens | None = None,
        on_progress: OnProgress | None = None,
        capture: bool = True,
    ) -> Result | list[Result]:
        """Continue one prompt, which gives one result, or a list of them, which gives a list.

        A prompt is text, token ids, a conversation, or a `Request`, which has settings of its own:
        then max_new_tokens, sampling, lens, steering, stop_ids and stop, which are for all prompts
        (see `Request`), do not count. Names of special tokens in a text are those tokens. A
        conversation is a list of mappings, each with a "role" and a "content", laid out by the
        model's chat template (see `Tokenizer.chat`, which gives ids and takes more); names of
        special tokens in it are plain text. By default a text ends at the end tokens of the model's
        configuration and at its tokenizer's.

        Prompts with equal seeds share their noise. max_batch: most prompts that run at once,
        default as many as fit the memory; the others wait for a free slot, and no result depends
        on which one it gets or on who is beside it.

        on_token(number of the prompt, id) is called as soon as a token is known, those of a stop
        text and the end token included, on_progress(positions fed, most) after every forward pass.
        on_lens(number, piece) is called with a Trace of each newly read position or block of
        positions; traces handed over are not kept, so that memory stays flat however long the text,
        and the results have no trace. The last new token is not fed back to the model, so a lens
        ends at the position before it. On CUDA, decode steps are captured as graphs unless capture
        is off. Raises ValueError for an empty prompt, one that with max_new_tokens exceeds the
        context, edits that do not fit the model, and a conversation without a chat template.
        """
        prompts, is_one = _prompts(prompt)
        requests = [
            each
            if isinstance(each, Request)
            else Request(each, max_new_tokens, sampling, steering, lens, stop_ids, stop)
            for each in prompts
        ]
        if on_lens is not None and all(request.lens is None for request in requests):
            raise ValueError("on_lens is given, but no lens")
        results = self._run(
            requests,
            max_batch=max_batch,
            on_token=on_token,
            on_lens=on_lens,
            on_progress=on_progress,
            capture=capture,
        )
        return results[0] if is_one else results

    def extract(
        self,
        pairs: Sequence[Pair],
        *,
        point: str | Sequence[str] = "resid_post",
        layers: Layers = "all",
        method: str = "mean_diff",
        at: str = "label",
        contrast: tuple[str, str] | None = None,
        form: PromptForm | None = None,
        on_progress: OnProgress | None = None,
    ) -> SteeringVectors:
        """Steering vectors from pairs of answers: see `shardlens.interp.extract`."""
        return extract(
            self.model,
            self.tokenizer,
            pairs,
            point=point,
            layers=layers,
            method=method,
            at=at,
            contrast=contrast,
            form=form,
            on_progress=on_progress,
        )

    def steerability(
        self,
        pairs: Sequence[Pair],
        vectors: SteeringVectors,
        *,
        multipliers: Sequence[float] = MULTIPLIERS,
        protocol: str = "paper",
        point: str | None = None,
        layers: Layers = "all",
        unit: str = "vector",
        form: PromptForm | None = None,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> SteerabilityReport:
        """How far answers follow the vectors: see `shardlens.interp.steerability`."""
        return steerability(
            self.model,
            self.tokenizer,
            pairs,
            vectors,
            multipliers=multipliers,
            protocol=protocol,
            point=point,
            layers=layers,
            unit=unit,
            form=form,
            seed=seed,
            on_progress=on_progress,
        )

    def _run(
        self,
        requests: Sequence[Request],
        *,
        max_batch: int | None,
        on_token: OnToken | None = None,
        on_lens: OnLens | None = None,
        on_progress: OnProgress | None = None,
        capture: bool = True,
    ) -> list[Result]:
        def on_rows(
            generation: Generation, positions: list[int], targets: list[int], rows: Tensor
        ) -> None:
            assert on_lens is not None and generation.record is not None
            taps = generation.record.taps
            on_lens(generation.number, Trace.from_rows(taps, positions, targets, rows))

        # a template's time may run out on one rank alone
        may_differ = any(is_conversation(request.prompt) for request in requests)
        with agreed(self.model.parallel) if may_differ else nullcontext():
            encoded = [self._encoded(request) for request in requests]
        generations = self._engine.run(
            encoded,
            max_batch=max_batch,
            on_token=on_token,
            on_rows=None if on_lens is None else on_rows,
            on_progress=on_progress,
            capture=capture,
        )
        return [
            self._result(generation, request, has_trace=on_lens is None)
            for generation, request in zip(generations, requests, strict=True)
        ]

    def _target(self, target: str | int | None) -> Literal["next"] | int | None:
        if not isinstance(target, str):
            return target
        return "next" if target == "next" else self.tokenizer.single_token(target)

    def _encoded(self, request: Request) -> Request:
        """The request as the engine takes it: token ids, and ends that need no text."""
        prompt, ends, stop_ids = request.prompt, request.ends, request.stop_ids
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        elif is_conversation(prompt):
            prompt = self.tokenizer.chat(prompt)
        if request.stop:
            ends = ends_at(self.tokenizer, stop_texts(self.tokenizer, request.stop), ends)
        if stop_ids is None and self._tokenizer is not None and self._tokenizer.eos_id is not None:
            stop_ids = {*self.model.config.eos_token_ids, self._tokenizer.eos_id}
        return replace(request, prompt=prompt, ends=ends, stop_ids=stop_ids, stop=())

    def _result(self, generation: Generation, request: Request, *, has_trace: bool) -> Result:
        text, trace = None, None
        if generation.record is not None and has_trace:
            trace = Trace.from_record(generation.record)
            trace.input_ids = [*generation.prompt, *generation.tokens]
        if self._tokenizer is not None:
            text = text_of(self._tokenizer, generation.tokens, request.stop or ())
            if trace is not None:
                trace.name_tokens(self._tokenizer.token_text)
                trace.prompt = request.prompt if isinstance(request.prompt, str) else None
                trace.text = text
        return Result(generation.tokens, text, generation.finish_reason, trace)


def load(
    source: str | Path,
    *,
    parallel: TensorParallel | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> LanguageModel:
    """The model and tokenizer of `source`, this rank's share of it.

    source: "demo", a directory in Hugging Face layout, a .gguf file, or a hub id such as
    "Qwen/Qwen3-4B".
    parallel: the ranks that share the model, default this process alone. dtype: default the
    checkpoint's. device: default this rank's CUDA device where there is one. revision: a branch,
    tag or commit of a hub id. adapter: a folder with a LoRA adapter of PEFT, which is added to the
    weights. on_progress(done, total) counts parameters filled. If any rank fails, every rank
    raises: ValueError for whatever is wrong with the files.
    """
    parallel = parallel if parallel is not None else TensorParallel.single()
    files = find_model(source, parallel, revision=revision, adapter=adapter)
    with agreed(parallel):
        tokenizer = files.tokenizer()
    model = load_model(
        files, parallel=parallel, dtype=dtype, device=device, on_progress=on_progress
    )
    return LanguageModel(model, tokenizer)


def is_conversation(prompt: object) -> TypeGuard[Conversation]:
    """Whether a prompt is messages to be laid out by a chat template."""
    return isinstance(prompt, Sequence) and any(isinstance(each, Mapping) for each in prompt[:1])


def _prompts(given: object) -> tuple[list[Any], bool]:
    """The prompts of a call, and whether it was given a single prompt and not a list."""
    if isinstance(given, str | Request) or hasattr(given, "shape"):  # a tensor, or an array
        return [given], True
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ValueError(
            f"a prompt of type {type(given).__name__}: give text, token ids, a conversation or a "
            "Request, or a list of them"
        )
    if not given or is_integer(given[0]) or is_conversation(given):
        return [given], True
    return list(given), False

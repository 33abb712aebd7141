"""A request for one text, and its progress through the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor

from ..model.arguments import all_of, integer, integers, is_integer, optional
from ..model.config import ModelConfig
from ..model.summary import one_line
from .edit_table import RequestEdits
from .lens_rows import LensRecord
from .lens_spec import LensSpec
from .sampling import GREEDY, Sampling
from .steering import Steering

Conversation = Sequence[Mapping[str, Any]]  # messages, each with a role and a content
Prompt = str | Sequence[int] | Tensor | Conversation
FinishReason = Literal["stop", "length"]

# (number of the request, token id) as soon as a token is known on the host
OnToken = Callable[[int, int], None]
# whether the new tokens so far, asked after each, end the text
Ends = Callable[[Sequence[int]], bool]
# (positions fed to the model so far, the most there can be)
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Request:
    """One text to continue, and how.

    prompt: token ids, as a sequence or a [T] tensor; a `LanguageModel` takes text and a
    conversation, too. max_new_tokens: 0 to read the prompt alone. sampling: greedy by default.
    steering: edits, which act one after another where they meet. lens: what to read on the way, if
    anything. stop_ids: tokens that end the text and are kept; default the model's own end tokens.
    stop: texts that end it, for a `LanguageModel`: the new tokens stay as they are, the result's
    text ends before the first. ends: whether the new tokens so far end the text, which every rank
    must answer alike. Raises ValueError for values of another kind.
    """

    prompt: Prompt
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    steering: Steering | Sequence[Steering] = ()
    lens: LensSpec | None = None
    stop_ids: Collection[int] | None = None
    stop: str | Sequence[str] | None = ()
    ends: Ends | None = None

    __repr__ = one_line

    def __post_init__(self) -> None:
        what = "a Steering or a list of them"
        checked: dict[str, Any] = {
            "max_new_tokens": integer(self.max_new_tokens, "max_new_tokens"),
            "steering": tuple(all_of(self.steering, Steering, "steering", what)),
        }
        stop = () if self.stop is None else self.stop
        checked["stop"] = tuple(all_of(stop, str, "stop", "a text or a list of texts"))
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling is of type {type(self.sampling).__name__}: give a Sampling")
        optional(self.lens, LensSpec, "lens", "a LensSpec or None")
        if self.stop_ids is not None:
            checked["stop_ids"] = frozenset(integers(self.stop_ids, "stop_ids"))
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen, but still being constructed


class Generation:
    """A request on its way through the engine.

    number: its index in the call. prompt: its token ids. tokens: those chosen so far.
    finish_reason: "stop" after a stop token or text, "length" after max_new_tokens, None before
    either. record: what its lens read.
    """

    def __init__(self, number: int, request: Request, config: ModelConfig) -> None:
        self.number, self.config = number, config
        self.prompt = _ids(request.prompt)
        self.request = replace(request, prompt=self.prompt)
        if request.stop:
            raise ValueError("the engine reads no text: give stop texts to a LanguageModel")
        self.max_new_tokens = request.max_new_tokens
        stop_ids = config.eos_token_ids if request.stop_ids is None else request.stop_ids
        self.stop_ids = frozenset(stop_ids)
        self.steering = cast("tuple[Steering, ...]", request.steering)  # as `Request` made it
        self.ends = request.ends
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.record: LensRecord | None = None
        if request.lens is not None:
            request.lens.check(config)
            self.record = LensRecord(request.lens, config)
        self.edits: RequestEdits | None = None
        self.n_launched = 0  # steps launched that choose one of its tokens
        # the last state of the prompt [1, P, d], if its lens waits for the first new token
        self.held_state: Tensor | None = None

    def check(self, name: str) -> None:
        """Raise ValueError for whatever the model cannot do, naming the request by `name`."""
        check_prompt(self.prompt, self.max_new_tokens, self.config, name)
        for token in sorted(self.stop_ids):
            if not 0 <= token < 2**31:
                raise ValueError(f"stop_ids of {name} hold {token}, which is no token id")
        n_fed = len(self.prompt) + max(0, self.max_new_tokens - 1)  # the last token is not
        for steering in self.steering:
            steering.check(self.config)
            steering.check_reach(len(self.prompt), n_fed, name)

    def arrange_edits(self, capacity: int) -> None:
        """Find the passes of the request's edits in a cache of so many positions."""
        if self.steering:
            n_prompt, n_layers = len(self.prompt), self.config.n_layers
            self.edits = RequestEdits(self.steering, n_prompt, capacity, n_layers)

    @property
    def n_cached(self) -> int:
        """Positions in the cache before the next step, which feeds the token after them."""
        return len(self.prompt) - 1 + self.n_launched

    def token_at(self, position: int) -> int:
        """The token at a position of the text; -1 where there is none yet."""
        if position < len(self.prompt):
            return self.prompt[position]
        index = position - len(self.prompt)
        return self.tokens[index] if index < len(self.tokens) else -1

    def append(self, token: int) -> None:
        self.tokens.append(token)
        ends = self.ends is not None and self.ends(self.tokens)
        if ends or token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_new_tokens:
            self.finish_reason = "length"


def check_prompt(
    prompt: Sequence[int], max_new_tokens: int, config: ModelConfig, name: str = "the prompt"
) -> None:
    """Raise ValueError for a prompt that is empty, too long, or not of this vocabulary."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} is below 0")
    if not prompt:
        raise ValueError(f"{name} is empty: give at least one token")
    outside = [token for token in prompt if not 0 <= token < config.vocab_size]
    if outside:
        raise ValueError(
            f"{name} holds token id {outside[0]}, outside the vocabulary of {config.vocab_size}"
        )
    if len(prompt) + max_new_tokens > config.context:
        raise ValueError(
            f"{name} has {len(prompt)} tokens; with {max_new_tokens} new ones that exceeds "
            f"the model's context of {config.context}"
        )


def _ids(prompt: Prompt) -> list[int]:
    is_text = isinstance(prompt, str | Mapping)
    is_list = isinstance(prompt, Sequence) and not is_text
    if is_text or (is_list and any(isinstance(each, str | Mapping) for each in prompt[:1])):
        raise ValueError("the engine takes token ids: give text to a LanguageModel")
    if is_integer(prompt):
        raise ValueError(f"a prompt is {prompt}: give a list of token ids")
    return integers(prompt, "the prompt")

"""`shardlens generate`: continue prompts, printing as tokens come."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .engine.files import write_json
from .engine.lens_spec import LensSpec
from .engine.request import Request, check_prompt
from .language_model import Result
from .options import (
    ModelOptions,
    add_eager_argument,
    add_model_arguments,
    add_output_arguments,
    add_prompt_arguments,
    add_sampling_arguments,
    add_stop_argument,
    form_of,
    output_files,
    sampling_of,
    stop_of,
)
from .session import Session, open_session
from .stop_text import StoppedText


def add_to(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt")
    add_model_arguments(parser)
    add_prompt_arguments(parser)
    add_sampling_arguments(parser)
    add_stop_argument(parser)
    add_eager_argument(parser)
    add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    sampling, form, stop = sampling_of(arguments), form_of(arguments), stop_of(arguments)
    session = open_session(ModelOptions.parsed(arguments), output_files(arguments))
    prompt = session.encode_prompt(arguments.prompt, form)
    session.check_stop(stop)
    lens = LensSpec() if arguments.out else None
    request = Request(prompt, arguments.max_new_tokens, sampling, lens=lens, stop=stop)
    check_prompt(prompt, arguments.max_new_tokens, session.config)
    lm = session.load([request], capture=not arguments.eager)
    session.print_prompt(arguments.prompt, form)
    printer = _Printer(session, stop)
    result = lm.generate(request, on_token=printer.push, capture=not arguments.eager)
    printer.finish()
    if not session.prints:
        return
    if result.trace is not None:
        result.trace.prompt = arguments.prompt
        for path in arguments.out:
            result.trace.save(path)
    if arguments.json is not None:
        write_json(arguments.json, _content(arguments.prompt, prompt, result, session))


def _content(
    prompt: str, prompt_ids: list[int], result: Result, session: Session
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "token_ids": result.token_ids,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "ranks": session.parallel.size,
        "sent_bytes": session.parallel.traffic.sent_bytes,
    }


class _Printer:
    """Prints text as its tokens arrive: whole characters only, and nothing of a stop text."""

    def __init__(self, session: Session, stop: Sequence[str]) -> None:
        self._print = session.print_text
        self._text = StoppedText(session.tokenizer, stop)

    def push(self, request: int, token: int) -> None:
        self._print(self._text.push(token))

    def finish(self) -> None:
        self._print(self._text.flush() + "\n")

"""`shardlens generate`: continue prompts, printing as tokens come."""

from __future__ import annotations

import argparse
from typing import Any

from rich.markup import escape

from .engine.files import write_json
from .engine.lens_spec import LensSpec
from .engine.request import Request, check_prompt
from .language_model import Result
from .options import (
    ModelOptions,
    add_chat_argument,
    add_eager_argument,
    add_model_arguments,
    add_output_arguments,
    add_sampling_arguments,
    output_files,
    sampling_of,
)
from .session import Session, open_session


def add_to(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt")
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True)
    add_sampling_arguments(parser)
    add_eager_argument(parser)
    add_chat_argument(parser)
    add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    sampling = sampling_of(arguments)
    session = open_session(ModelOptions.parsed(arguments), output_files(arguments))
    prompt = session.encode_prompt(arguments.prompt, chat=arguments.chat)
    lens = LensSpec() if arguments.out else None
    request = Request(prompt, arguments.max_new_tokens, sampling, lens=lens)
    check_prompt(prompt, arguments.max_new_tokens, session.config)
    lm = session.load([request], capture=not arguments.eager)
    session.console.print(f"[dim]{escape(arguments.prompt)}[/]", end="")
    printer = _Printer(session)
    result = lm.generate(request, on_token=printer.push, capture=not arguments.eager)
    printer.finish()
    if not session.prints:
        return
    if result.trace is not None:
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
    """Prints text as its tokens arrive, whole characters only."""

    def __init__(self, session: Session) -> None:
        self._out = session.console
        self._stream = session.tokenizer.stream()

    def push(self, request: int, token: int) -> None:
        self._print(self._stream.push(token))

    def finish(self) -> None:
        self._print(self._stream.flush() + "\n")

    def _print(self, text: str) -> None:
        self._out.print(text, end="", markup=False, soft_wrap=True)
        self._out.file.flush()

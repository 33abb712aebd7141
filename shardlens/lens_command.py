"""`shardlens lens`: a table of each layer's predictions."""

from __future__ import annotations

import argparse
from typing import Any, Literal

from .engine.files import write_json
from .engine.lens_spec import LensSpec
from .engine.request import Request
from .interp.labels import PromptForm
from .interp.trace_table import print_trace
from .model.points import POINTS
from .options import (
    ModelOptions,
    add_eager_argument,
    add_model_arguments,
    add_output_arguments,
    add_prompt_arguments,
    add_stop_argument,
    form_of,
    output_files,
    stop_of,
)
from .parallel.collectives import agreed
from .session import Session, open_session, progress


def add_to(commands: Any) -> None:
    parser = commands.add_parser("lens", help="what each layer would have said at each position")
    add_model_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument("--layers", default="all", help="all, or e.g. 0-3,8,-1 (default: all)")
    parser.add_argument(
        "--points", default="resid_post", help=f"comma-separated, of {', '.join(POINTS)}"
    )
    parser.add_argument(
        "--top-k", type=int, default=5, help="candidates kept per cell (default: 5)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=0, help="continue the prompt, greedily (default: 0)"
    )
    parser.add_argument("--positions", choices=("all", "last", "generated"), default="all")
    parser.add_argument(
        "--target", metavar="TOKEN", help="report this token's rank instead of the next token's"
    )
    add_stop_argument(parser)
    add_eager_argument(parser)
    add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    form = form_of(arguments)
    if arguments.stop and not arguments.max_new_tokens:
        raise ValueError("--stop ends a continuation: give --max-new-tokens, too")
    session = open_session(ModelOptions.parsed(arguments), output_files(arguments))
    request = _request(arguments, form, session)
    lm = session.load([request], capture=not arguments.eager)
    with progress("reading", shown=session.prints) as on_progress:
        result = lm.generate(request, on_progress=on_progress, capture=not arguments.eager)
    trace = result.trace
    if not session.prints or trace is None:
        return
    if arguments.max_new_tokens or form.chat:
        session.print_prompt(arguments.prompt, form)
        session.print_text(f"{result.text or ''}\n\n")
    print_trace(trace, session.console)
    trace.prompt = arguments.prompt
    for path in arguments.out:
        trace.save(path)
    if arguments.json is not None:
        write_json(arguments.json, trace.to_dict())


def _request(arguments: argparse.Namespace, form: PromptForm, session: Session) -> Request:
    with agreed(session.parallel):
        target: Literal["next"] | int = "next"
        if arguments.target is not None:
            target = session.tokenizer.single_token(arguments.target)
    spec = LensSpec(
        points=tuple(arguments.points.split(",")),
        layers=arguments.layers,
        top_k=arguments.top_k,
        targets=target,
        positions=arguments.positions,
    )
    prompt, stop = session.encode_prompt(arguments.prompt, form), stop_of(arguments)
    session.check_stop(stop)
    return Request(prompt, arguments.max_new_tokens, lens=spec, stop=stop)

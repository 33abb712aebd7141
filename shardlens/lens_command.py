"""`shardlens lens`: a table of what each layer would have said."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rich.markup import escape

from .engine.files import write_json
from .engine.lens_spec import LensSpec
from .interp.trace_table import print_trace
from .model.points import POINTS
from .run import Result, generate
from .session import (
    add_chat_argument,
    add_eager_argument,
    add_model_arguments,
    add_output_arguments,
    open_session,
    progress,
    prompt_ids,
    run_needs,
    trace_files,
)


def add_to(commands: Any) -> None:
    parser = commands.add_parser("lens", help="what each layer would have said at each position")
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--layers", default="all", help="all, or e.g. 0-3,8,-1 (default: all)")
    parser.add_argument(
        "--points", default="resid_post", help=f"comma-separated, of {', '.join(POINTS)}"
    )
    parser.add_argument("--top-k", type=int, default=5, help="winners kept a cell (default: 5)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=0, help="continue the prompt, greedily, by so many"
    )
    parser.add_argument("--positions", choices=("all", "last", "generated"), default="all")
    parser.add_argument(
        "--target", metavar="TOKEN", help="report this token's rank instead of the next token's"
    )
    add_eager_argument(parser)
    add_chat_argument(parser)
    add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    target = arguments.target
    spec = LensSpec(
        points=tuple(arguments.points.split(",")),
        layers=arguments.layers,
        top_k=arguments.top_k,
        positions=arguments.positions,
    )
    session = open_session(arguments, run_needs(arguments, spec), trace_files(arguments))
    if target is not None:
        spec = dataclasses.replace(spec, targets=session.tokenizer.single_token(target))
    prompt = prompt_ids(session.tokenizer, arguments.prompt, chat=arguments.chat)
    with progress("reading", shown=session.prints) as on_progress:
        result = generate(
            session.model,
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            lens=spec,
            on_progress=on_progress,
            capture=not arguments.eager,
        )
    assert isinstance(result, Result) and result.trace is not None
    if not session.prints:
        return
    if arguments.max_new_tokens:
        session.console.print(f"[dim]{escape(arguments.prompt)}[/]{escape(result.text or '')}\n")
    print_trace(result.trace, session.console)
    for path in arguments.out:
        result.trace.save(path)
    if arguments.json is not None:
        content = {"prompt": arguments.prompt, "text": result.text, **result.trace.to_dict()}
        write_json(arguments.json, content)

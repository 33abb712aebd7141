"""`shardlens steer generate`: one prompt, without a vector and with it, side by side."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .engine.files import write_json
from .engine.lens_spec import LensSpec
from .engine.steering import POSITION_RULES, UNITS, Rule, Steering
from .engine.vectors import SteeringVectors
from .interp.extract import model_fingerprint
from .kernels.edits import MODES
from .model.config import ModelConfig
from .run import Result, generate
from .session import (
    NeedsFn,
    add_chat_argument,
    add_eager_argument,
    add_json_argument,
    add_model_arguments,
    add_sampling_arguments,
    open_session,
    prompt_ids,
    run_needs,
    sampling_of,
)
from .steer_session import add_place_arguments
from .tokenizer.tokenizer import Tokenizer

HELP = "continue a prompt, unsteered and steered"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--vector", type=Path, required=True, metavar="FILE")
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--scale",
        type=float,
        nargs="+",
        default=[1.0],
        help="one or several: a column each (default: 1)",
    )
    parser.add_argument(
        "--positions",
        default="all",
        help=f"{', '.join(POSITION_RULES)}, 5- from position 5 on, or 3,7,9 (default: all)",
    )
    add_place_arguments(parser)
    parser.add_argument("--mode", choices=MODES, default="add")
    parser.add_argument(
        "--unit",
        choices=UNITS,
        default="vector",
        help="of --scale: the vector, or the mean norm of the states (default: vector)",
    )
    add_sampling_arguments(parser)
    add_eager_argument(parser)
    add_chat_argument(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    positions_of(arguments.positions)
    session = open_session(arguments, _needs(arguments))
    vectors = SteeringVectors.load(arguments.vector, session.model.config)
    steerings = _steerings(arguments, vectors, session.model.config)
    prompt = prompt_ids(session.tokenizer, arguments.prompt, chat=arguments.chat)
    results = generate(
        session.model,
        [prompt] * (1 + len(steerings)),
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling_of(arguments),
        steering=[[], *([steering] for steering in steerings)],
        capture=not arguments.eager,
    )
    assert isinstance(results, list)
    if not session.prints:
        return
    warning = vectors.warning(model_fingerprint(session.model))
    if warning is not None:
        session.console.print(f"warning: {warning}", markup=False)
    names = ["unsteered", *(f"scale {scale:g}" for scale in arguments.scale)]
    session.console.print(f"[dim]{escape(arguments.prompt)}[/]")
    session.console.print(_columns(names, results))
    if arguments.json is not None:
        write_json(arguments.json, _content(arguments, results))


def _steerings(
    arguments: argparse.Namespace, vectors: SteeringVectors, config: ModelConfig
) -> list[Steering]:
    """One a scale. Raises ValueError for vectors that do not fit the model."""
    steerings = [
        Steering(
            vectors,
            arguments.layers,
            arguments.point,
            mode=arguments.mode,
            scale=scale,
            positions=positions_of(arguments.positions),
            unit=arguments.unit,
        )
        for scale in arguments.scale
    ]
    for steering in steerings:
        steering.check(config)
    return steerings


def _needs(arguments: argparse.Namespace) -> NeedsFn:
    plain = run_needs(arguments, None)

    def needs(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, int, LensSpec | None]:
        _steerings(arguments, SteeringVectors.load(arguments.vector, config), config)
        return plain(config, tokenizer)

    return needs


def positions_of(text: str) -> Rule:
    """A rule by name, "5-" for all from position 5 on, or numbers with commas between them."""
    if text in POSITION_RULES:
        return text
    if re.fullmatch(r"\d+-", text):
        return int(text[:-1])
    if re.fullmatch(r"\d+(,\d+)*", text):
        return [int(number) for number in text.split(",")]
    raise ValueError(
        f"positions {text!r}: there are {', '.join(POSITION_RULES)}, "
        "5- from position 5 on, or numbers such as 3,7,9"
    )


def _columns(names: list[str], results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, expand=True)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text((result.text or "").strip()) for result in results))
    return table


def _content(arguments: argparse.Namespace, results: list[Result]) -> dict[str, object]:
    return {
        "prompt": arguments.prompt,
        "vector": str(arguments.vector),
        "mode": arguments.mode,
        "unit": arguments.unit,
        "positions": arguments.positions,
        "results": [
            {"scale": scale, "text": result.text, "token_ids": result.token_ids}
            for scale, result in zip([None, *arguments.scale], results, strict=True)
        ],
    }

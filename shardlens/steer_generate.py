"""`shardlens steer generate`: one prompt, without a vector and with it, side by side."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from .engine.files import write_json
from .engine.fingerprint import model_fingerprint
from .engine.request import Request
from .engine.steering import POSITION_RULES, Rule, Steering
from .engine.tap_names import tap_name
from .engine.vector_checks import UNITS
from .engine.vectors import SteeringVectors
from .interp.report_best import read_best
from .kernels.edits import MODES
from .language_model import Result
from .model.points import Layers, Tap
from .options import (
    ModelOptions,
    add_eager_argument,
    add_json_argument,
    add_model_arguments,
    add_prompt_arguments,
    add_sampling_arguments,
    add_stop_argument,
    form_of,
    json_files,
    sampling_of,
    stop_of,
)
from .parallel.collectives import agreed
from .session import open_session
from .steer_options import add_tap_arguments
from .tokenizer.visible import cell

HELP = "continue a prompt, unsteered and steered"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--vector", type=Path, required=True, metavar="FILE")
    add_prompt_arguments(parser)
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
    add_tap_arguments(parser, default_layers=None)
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="what `steer eval --json` wrote of these vectors: steer its best layer",
    )
    parser.add_argument("--mode", choices=MODES, default="add")
    parser.add_argument(
        "--unit",
        choices=UNITS,
        default="vector",
        help="of --scale: the vector, or the mean norm of the states (default: vector)",
    )
    add_sampling_arguments(parser)
    add_stop_argument(parser)
    add_eager_argument(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    positions, sampling = positions_of(arguments.positions), sampling_of(arguments)
    form, stop = form_of(arguments), stop_of(arguments)
    session = open_session(ModelOptions.parsed(arguments), json_files(arguments))
    prompt = session.encode_prompt(arguments.prompt, form)
    session.check_stop(stop)
    with agreed(session.parallel):
        vectors = SteeringVectors.load(arguments.vector, session.config)
        chosen, reason = _chosen(arguments, vectors)
        steerings = _steerings(arguments, vectors, chosen, positions)
    requests = [
        Request(prompt, arguments.max_new_tokens, sampling, steering=steering, stop=stop)
        for steering in ([], *([steering] for steering in steerings))
    ]

    lm = session.load(requests, capture=not arguments.eager)

    results = lm.generate(requests, capture=not arguments.eager)
    warning = vectors.warning(model_fingerprint(lm.model))
    if warning is not None:
        session.console.print(f"warning: {warning}")
    if reason is not None:
        session.console.print(reason)
    names = ["unsteered", *(f"scale {scale:g}" for scale in arguments.scale)]
    session.print_prompt(arguments.prompt, form)
    session.print_text("\n")
    session.console.print(_columns(names, results))
    if session.prints and arguments.json is not None:
        taps = steerings[0].taps(session.config.n_layers)
        write_json(arguments.json, _content(arguments, taps, results))


class _Chosen(NamedTuple):
    """The layers whose vectors are added, at a point, or at the only one that has any."""

    layers: Layers
    point: str | None


def _chosen(arguments: argparse.Namespace, vectors: SteeringVectors) -> tuple[_Chosen, str | None]:
    """The layers asked for, or one layer of several and a line that says why this one."""
    layers, point, report = arguments.layers, arguments.point, arguments.report
    if layers is not None:
        if report is not None:
            raise ValueError("--layers and --report both choose layers: give one of them")
        return _Chosen(layers, point), None
    if report is not None:
        best = read_best(report)
        if point not in (None, best.point):
            raise ValueError(f"--point is {point}, but {report} found {tap_name(best)} best")
        return _Chosen([best.layer], best.point), f"steering {tap_name(best)}, the best of {report}"
    only = Steering(vectors, point=point).point  # refuses a choice among several points
    held = [tap.layer for tap in vectors.taps if tap.point == only]
    middle = held[(len(held) - 1) // 2]
    if len(held) == 1:
        return _Chosen(held, only), None
    return _Chosen([middle], only), (
        f"steering layer {middle}, the middle one of the {len(held)} in {arguments.vector}: "
        "choose by --layers (or all), or by --report"
    )


def _steerings(
    arguments: argparse.Namespace, vectors: SteeringVectors, chosen: _Chosen, positions: Rule
) -> list[Steering]:
    """One for each scale. Raises ValueError for layers and points without a vector."""
    return [
        Steering(
            vectors,
            chosen.layers,
            chosen.point,
            mode=arguments.mode,
            scale=scale,
            positions=positions,
            unit=arguments.unit,
        )
        for scale in arguments.scale
    ]


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
    table.add_row(*(Text(_lines((result.text or "").strip())) for result in results))
    return table


def _lines(text: str) -> str:
    """A text in a cell, with its line breaks shown and made."""
    return "\n".join(f"{line}⏎" for line in map(cell, text.split("\n"))).removesuffix("⏎")


def _content(
    arguments: argparse.Namespace, taps: list[Tap], results: list[Result]
) -> dict[str, object]:
    return {
        "prompt": arguments.prompt,
        "vector": str(arguments.vector),
        "taps": [list(tap) for tap in taps],
        "mode": arguments.mode,
        "unit": arguments.unit,
        "positions": arguments.positions,
        "results": [
            {"scale": scale, "text": result.text, "token_ids": result.token_ids}
            for scale, result in zip([None, *arguments.scale], results, strict=True)
        ],
    }

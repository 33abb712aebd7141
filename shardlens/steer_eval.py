"""`shardlens steer eval`: how far answers follow a vector, as curves with slopes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .engine.files import write_json
from .engine.lens_spec import LensSpec
from .engine.steering import UNITS
from .engine.vectors import SteeringVectors
from .interp.pairs import Pair, read_pairs
from .interp.prompts import encode_pairs, split_pairs
from .interp.propensity import PROTOCOLS
from .interp.report import SteerabilityReport
from .interp.report_png import check_matplotlib
from .interp.report_table import curve_table, layer_map, slopes_table, summary_lines
from .interp.slopes import MULTIPLIERS
from .interp.steerability import steerability
from .interp.suggest import suggest
from .model.config import ModelConfig
from .session import (
    NeedsFn,
    Session,
    add_json_argument,
    add_model_arguments,
    open_session,
    progress,
)
from .steer_session import (
    add_extraction_arguments,
    add_pair_arguments,
    extracted,
    for_extraction,
    for_measuring,
    form_of,
    pair_needs,
)
from .tokenizer.tokenizer import Tokenizer

HELP = "measure how far answers follow a vector"
SUGGESTED = "suggested"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_pair_arguments(parser)
    add_extraction_arguments(parser)
    parser.add_argument(
        "--vector", type=Path, metavar="FILE", help="default: one from a share of the pairs"
    )
    parser.add_argument(
        "--share", type=float, default=0.4, help="of the pairs for the vector (default: 0.4)"
    )
    parser.add_argument(
        "--multipliers",
        default=",".join(f"{m:g}" for m in MULTIPLIERS),
        help="of the vector, with commas; write --multipliers=-1,0,1 (default: %(default)s)",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="paper")
    parser.add_argument(
        "--unit",
        choices=UNITS,
        default="vector",
        help="of the multipliers: the vector, or the mean norm of the states (default: vector)",
    )
    add_json_argument(parser)
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw curves and map")


def run(arguments: argparse.Namespace) -> None:
    multipliers = _multipliers(arguments.multipliers)
    pairs = read_pairs(arguments.pairs)
    session = open_session(
        arguments,
        _needs(pairs, arguments),
        [] if arguments.png is None else [(arguments.png, check_matplotlib)],
    )
    layers = arguments.layers
    if layers == SUGGESTED:
        encoded = encode_pairs(session.tokenizer, pairs, form_of(arguments))
        layers = [suggest(session.model, encoded)[1].layer]
    if arguments.vector is None:
        made_from, pairs = split_pairs(pairs, arguments.share, arguments.seed)
        vectors, point = extracted(session, made_from, arguments, layers), None
    else:
        vectors = SteeringVectors.load(arguments.vector, session.model.config)
        point = arguments.point
    with progress("measuring", shown=session.prints) as on_progress:
        report = steerability(
            session.model,
            session.tokenizer,
            pairs,
            vectors,
            multipliers=multipliers,
            protocol=arguments.protocol,
            point=point,
            layers=layers,
            unit=arguments.unit,
            form=form_of(arguments),
            seed=arguments.seed,
            on_progress=on_progress,
        )
    if not session.prints:
        return
    _show(session, report)
    if arguments.json is not None:
        write_json(arguments.json, report.to_dict())
    if arguments.png is not None:
        report.save(arguments.png)


def _needs(pairs: Sequence[Pair], arguments: argparse.Namespace) -> NeedsFn:
    forms = [for_measuring(arguments)]
    if arguments.vector is None:
        forms.append(for_extraction(arguments))
    of_pairs = pair_needs(pairs, *forms)

    def needs(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, int, LensSpec | None]:
        if arguments.vector is not None:
            SteeringVectors.load(arguments.vector, config).check(config)
        return of_pairs(config, tokenizer)

    return needs


def _multipliers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"multipliers {text!r}: write numbers with commas between them") from None


def _show(session: Session, report: SteerabilityReport) -> None:
    console = session.console
    console.print(slopes_table(report))
    console.print(curve_table(report, report.best))
    if len(report.taps) > 1:
        console.print(layer_map(report))
    for line in summary_lines(report):
        console.print(line, markup=False)

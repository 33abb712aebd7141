"""`shardlens steer eval`: how far answers follow a vector, as curves with slopes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .engine.files import write_json
from .engine.request import Request
from .engine.vector_checks import UNITS
from .engine.vectors import SteeringVectors
from .interp.extract import Extraction
from .interp.pairs import Pair, read_pairs
from .interp.prompts import PairIds, check_length, encode_pairs, longest
from .interp.propensity import PROTOCOLS
from .interp.report import SteerabilityReport
from .interp.report_png import check_picture
from .interp.report_table import curve_table, layer_map, slopes_table, summary_lines
from .interp.slopes import MULTIPLIERS
from .interp.split import split_pairs
from .interp.steerability import Sweep, steerability_encoded
from .interp.suggest import suggest
from .model.points import Layers
from .model.transformer import Transformer
from .options import ModelOptions, add_json_argument, add_model_arguments, form_of, json_files
from .parallel.collectives import agreed
from .session import Session, open_session, progress
from .steer_extract import extracted
from .steer_options import add_extraction_arguments, add_pair_arguments, extraction_of

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
    sweep = Sweep(multipliers, arguments.protocol, arguments.unit, arguments.seed)
    pairs = read_pairs(arguments.pairs)
    pictures = [] if arguments.png is None else [(arguments.png, check_picture)]
    session = open_session(ModelOptions.parsed(arguments), [*pictures, *json_files(arguments)])
    with agreed(session.parallel):
        inputs = _Inputs.read(arguments, pairs, session)

    lm = session.load([Request(longest(inputs.all_encoded), max_new_tokens=0)], capture=False)

    suggestion = suggest(lm.model, inputs.encoded) if arguments.layers == SUGGESTED else None
    layers = arguments.layers if suggestion is None else [suggestion.tap.layer]
    vectors = inputs.vectors_at(layers, lm.model, session)
    with progress("measuring", shown=session.prints) as on_progress:
        report = steerability_encoded(
            lm.model, inputs.test, vectors, sweep, suggestion=suggestion, on_progress=on_progress
        )
    if session.prints:
        _save(arguments, report)
    _show(session, report)


@dataclass(frozen=True)
class _Inputs:
    """Vectors, or how to make them; and the pairs to make and measure them, as token ids."""

    vectors: SteeringVectors | None
    extraction: Extraction | None
    point: str | None  # of given vectors
    encoded: list[PairIds]  # all pairs, with labels
    train: list[PairIds]  # to extract from, in the form of the extraction
    test: list[PairIds]  # to measure on

    @classmethod
    def read(cls, arguments: argparse.Namespace, pairs: list[Pair], session: Session) -> _Inputs:
        """The inputs of a call. Raises ValueError for vectors, layers and pairs that do not fit."""
        form, is_open = form_of(arguments), arguments.layers == SUGGESTED
        encoded = encode_pairs(session.tokenizer, pairs, form)
        check_length(len(longest(encoded)), session.config)
        if arguments.vector is not None:
            vectors = SteeringVectors.load(arguments.vector, session.config)
            if not is_open:
                vectors = vectors.select(arguments.point, arguments.layers)
            return cls(vectors, None, arguments.point, encoded, [], encoded)
        extraction = extraction_of(arguments, "all" if is_open else arguments.layers)
        extraction.taps(session.config.n_layers)
        train, test = split_pairs(pairs, arguments.share, arguments.seed)
        # what can be measured can be extracted from, but for the texts of a contrast
        sources = encoded
        if extraction.contrast is not None:
            sources = extraction.encode(session.tokenizer, pairs, form)
        return cls(None, extraction, None, encoded, _chosen(sources, train), _chosen(encoded, test))

    @property
    def all_encoded(self) -> list[PairIds]:
        return [*self.encoded, *self.train]

    def vectors_at(self, layers: Layers, model: Transformer, session: Session) -> SteeringVectors:
        """The given vectors of some layers, or new ones."""
        if self.vectors is not None:
            return self.vectors.select(self.point, layers)
        assert self.extraction is not None
        extraction = dataclasses.replace(self.extraction, layers=layers)
        return extracted(session, model, self.train, extraction)


def _chosen(encoded: Sequence[PairIds], pairs: Sequence[Pair]) -> list[PairIds]:
    """The token ids of some of the pairs."""
    by_key = {ids.key: ids for ids in encoded}
    return [by_key[pair.key] for pair in pairs]


def _multipliers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"multipliers {text!r}: write numbers with commas between them") from None


def _save(arguments: argparse.Namespace, report: SteerabilityReport) -> None:
    if arguments.json is not None:
        write_json(arguments.json, report.to_dict())
    if arguments.png is not None:
        report.save(arguments.png)


def _show(session: Session, report: SteerabilityReport) -> None:
    console = session.console
    console.print(slopes_table(report))
    console.print(curve_table(report, report.best))
    if len(report.taps) > 1:
        console.print(layer_map(report))
    for line in summary_lines(report):
        console.print(line)

"""`shardlens steer extract`: vectors from pairs of answers, into a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from .engine.files import write_json
from .engine.request import Request
from .engine.vector_files import check_format
from .engine.vectors import SteeringVectors
from .interp.extract import Extraction, extract_encoded
from .interp.pairs import read_pairs
from .interp.prompts import PairIds, longest
from .interp.split import split_pairs
from .model.transformer import Transformer
from .options import ModelOptions, add_json_argument, add_model_arguments, form_of, json_files
from .parallel.collectives import agreed
from .session import Session, open_session, progress
from .steer_options import add_extraction_arguments, add_pair_arguments, extraction_of

HELP = "make vectors from pairs of answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_pair_arguments(parser)
    add_extraction_arguments(parser)
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="of the pairs; `steer eval` measures on the rest (default: 1, all)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a .safetensors or .gguf file"
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    extraction = extraction_of(arguments, arguments.layers)
    pairs = read_pairs(arguments.pairs)
    if arguments.share != 1:
        pairs, _ = split_pairs(pairs, arguments.share, arguments.seed)
    files = [(arguments.out, check_format), *json_files(arguments)]
    session = open_session(ModelOptions.parsed(arguments), files)
    with agreed(session.parallel):
        check_format(arguments.out, extraction.taps(session.config.n_layers))
        encoded = extraction.encode(session.tokenizer, pairs, form_of(arguments))

    lm = session.load([Request(longest(encoded), max_new_tokens=0)], capture=False)

    vectors = extracted(session, lm.model, encoded, extraction)
    if session.prints:
        vectors.save(arguments.out)
        if arguments.json is not None:
            write_json(arguments.json, _content(vectors))
    session.console.print(_table(vectors))
    session.console.print(f"{len(pairs)} pairs, {arguments.method}: wrote {arguments.out}")


def extracted(
    session: Session, model: Transformer, encoded: Sequence[PairIds], extraction: Extraction
) -> SteeringVectors:
    """The vectors of pairs, with a bar while they are read, and warnings after it."""
    warnings: list[str] = []
    with progress("extracting", shown=session.prints) as on_progress:
        vectors = extract_encoded(
            model,
            encoded,
            extraction,
            text_of=session.tokenizer.token_text,
            on_progress=on_progress,
            on_warning=warnings.append,
        )
    for line in warnings:
        session.warn(line)
    return vectors


def _table(vectors: SteeringVectors) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title="vectors", title_justify="left")
    for name in ("layer", "point", "norm", "of the states'", "cosine with the next"):
        table.add_column(name, justify="left" if name == "point" else "right")
    taps, cosines = vectors.cosines()
    for index, tap in enumerate(taps):
        is_followed = index + 1 < len(taps) and taps[index + 1].point == tap.point
        table.add_row(
            str(tap.layer),
            tap.point,
            f"{vectors.norm(tap):.3f}",
            f"{vectors.norm(tap) / vectors.resid_norm(tap):.1%}",
            f"{float(cosines[index, index + 1]):.2f}" if is_followed else "",
        )
    return table


def _content(vectors: SteeringVectors) -> dict[str, object]:
    return {
        "origin": vars(vectors.origin),
        "n_layers": vectors.n_layers,
        "vectors": [
            {
                "layer": tap.layer,
                "point": tap.point,
                "norm": vectors.norm(tap),
                "resid_norm": vectors.resid_norm(tap),
            }
            for tap in vectors.taps
        ],
    }

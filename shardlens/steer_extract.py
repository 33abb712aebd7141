"""`shardlens steer extract`: vectors from pairs of answers, into a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from .engine.files import write_json
from .engine.lens_spec import LensSpec
from .engine.vector_files import check_format
from .engine.vectors import SteeringVectors
from .interp.extract import taps_of
from .interp.pairs import Pair, read_pairs
from .interp.prompts import split_pairs
from .model.config import ModelConfig
from .session import NeedsFn, add_json_argument, add_model_arguments, open_session
from .steer_session import (
    add_extraction_arguments,
    add_pair_arguments,
    extracted,
    for_extraction,
    pair_needs,
    points_of,
)
from .tokenizer.tokenizer import Tokenizer

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
    pairs = read_pairs(arguments.pairs)
    if arguments.share != 1:
        pairs, _ = split_pairs(pairs, arguments.share, arguments.seed)
    session = open_session(arguments, _needs(pairs, arguments), [(arguments.out, check_format)])
    vectors = extracted(session, pairs, arguments, arguments.layers)
    if not session.prints:
        return
    vectors.save(arguments.out)
    session.console.print(_table(vectors))
    session.console.print(f"{len(pairs)} pairs, {arguments.method}: wrote {arguments.out}")
    if arguments.json is not None:
        write_json(arguments.json, _content(vectors))


def _needs(pairs: Sequence[Pair], arguments: argparse.Namespace) -> NeedsFn:
    of_pairs = pair_needs(pairs, for_extraction(arguments))

    def needs(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, int, LensSpec | None]:
        taps = taps_of(points_of(arguments), arguments.layers, config.n_layers)
        check_format(arguments.out, taps)
        return of_pairs(config, tokenizer)

    return needs


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

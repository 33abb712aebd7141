"""The options that the verbs of `shardlens steer` share, as the library takes them."""

from __future__ import annotations

import argparse
from pathlib import Path

from .engine.steering import DEFAULT_POINT
from .interp.directions import METHODS
from .interp.extract import AT, Extraction
from .model.points import POINTS, Layers
from .options import add_form_arguments


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL or JSON: question and two answers, or positive and negative texts",
    )
    add_form_arguments(parser, "questions are a user's chat messages")
    parser.add_argument(
        "--answer-prefix",
        metavar="TEXT",
        help="text between question and answer outside a chat, taken as it is (default: a line "
        "'Answer:' and a space)",
    )


def add_extraction_arguments(parser: argparse.ArgumentParser) -> None:
    add_tap_arguments(parser)
    parser.add_argument("--method", choices=METHODS, default="mean_diff")
    parser.add_argument(
        "--at", choices=AT, help="the state that represents an answer (default: the label's)"
    )
    parser.add_argument(
        "--contrast",
        nargs=2,
        metavar=("TEXT", "TEXT"),
        help="instead of answers compare questions after two texts, the matching one first; in a "
        "chat they are system messages, in place of --system",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")


def add_tap_arguments(parser: argparse.ArgumentParser, default_layers: str | None = "all") -> None:
    """--layers and --point; None as the default of layers is one of those that have a vector."""
    default = "all" if default_layers else "the best of --report, or the middle one of the file"
    parser.add_argument(
        "--layers", default=default_layers, help=f"all, or e.g. 0-3,8,-1 (default: {default})"
    )
    parser.add_argument("--point", help=f"of {', '.join(POINTS)}")


def extraction_of(arguments: argparse.Namespace, layers: Layers) -> Extraction:
    """The extraction that the arguments of `add_extraction_arguments` describe. ValueError."""
    if arguments.contrast is not None and arguments.at is not None:
        raise ValueError(
            "--at chooses a state of answers, which --contrast does not compare: give one of them"
        )
    return Extraction(
        point=(arguments.point or DEFAULT_POINT).split(","),
        layers=layers,
        method=arguments.method,
        at=arguments.at or "label",
        contrast=None if arguments.contrast is None else tuple(arguments.contrast),
    )

"""`shardlens steer VERB`: make vectors from pairs of answers, apply them, measure what they do."""

from __future__ import annotations

from typing import Any

from . import steer_eval, steer_extract, steer_generate

VERBS = {"extract": steer_extract, "generate": steer_generate, "eval": steer_eval}


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "steer", help="vectors from pairs of answers, applied and measured"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)

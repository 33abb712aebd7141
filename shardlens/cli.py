"""The command line: `python -m shardlens COMMAND`, alone or under torchrun.

Every rank runs the same command on the same arguments; rank 0 alone prints and writes files.
Exit codes: 0 done, 2 bad input (one line says what), 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from . import bench_command, generate_command, lens_command
from .session import is_printing_rank

# torchrun answers 1 for whatever code its ranks end with. A launcher that wants the true code
# names a file here; then a rank that refuses bad input writes its code there and ends with 0.
EXIT_CODE_FILE = "SHARDLENS_EXIT_CODE_FILE"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shardlens",
        description="Read and steer LLaMA and Qwen models too large for one GPU, while they run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (lens_command, generate_command, bench_command):
        module.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)
    except ValueError as error:
        return _refuse(str(error))
    finally:
        # After an error of this rank alone the others may wait in a collective: tearing the group
        # down would wait for them, leaving lets them see the closed connection.
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()
    return 0


def _refuse(message: str) -> int:
    if is_printing_rank():
        print(f"shardlens: {' '.join(message.split())}", file=sys.stderr)
    code_file = os.environ.get(EXIT_CODE_FILE)
    if code_file is None:
        return 2
    Path(code_file).write_text("2")
    return 0

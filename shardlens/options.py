"""The options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .engine.sampling import Sampling
from .interp.trace_files import check_format
from .kernels.dispatch import IMPLEMENTATIONS
from .model.config import DTYPE_BYTES

# a file to be written, and what raises ValueError for an ending that cannot be
OutputFile = tuple[Path, Callable[[Path], None]]


@dataclass(frozen=True)
class ModelOptions:
    """Which model to run, and how."""

    model: str
    dtype: str | None  # default the checkpoint's
    kernels: str
    device: str | None

    @classmethod
    def parsed(cls, arguments: argparse.Namespace) -> ModelOptions:
        return cls(arguments.model, arguments.dtype, arguments.kernels, arguments.device)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a directory, a Hugging Face hub id, or demo"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="default: the checkpoint's")
    parser.add_argument(
        "--kernels",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="auto: Triton kernels on CUDA, their PyTorch references elsewhere",
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_argument(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="write the lens trace as .json, .html, .png or .parquet; may be repeated",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k best; 0 is all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample in the nucleus of mass p")
    parser.add_argument("--seed", type=int, default=0)


def add_eager_argument(parser: argparse.ArgumentParser) -> None:
    """For commands that generate."""
    parser.add_argument(
        "--eager", action="store_true", help="run each decode step without a CUDA graph"
    )


def add_chat_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's chat message")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    return Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)


def output_files(arguments: argparse.Namespace) -> list[OutputFile]:
    """The files of --out and --json."""
    return [*((path, check_format) for path in arguments.out), *json_files(arguments)]


def json_files(arguments: argparse.Namespace) -> list[OutputFile]:
    """The file of --json, which may have any ending."""
    return [] if arguments.json is None else [(arguments.json, lambda path: None)]

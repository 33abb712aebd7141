"""The options that several commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .engine.sampling import Sampling
from .interp.labels import PromptForm
from .interp.trace_files import check_format
from .kernels.dispatch import IMPLEMENTATIONS
from .model.config import DTYPE_BYTES
from .parallel.group import TIMEOUT_S

# a file to be written, and a function that raises ValueError for endings it cannot have
OutputFile = tuple[Path, Callable[[Path], None]]


@dataclass(frozen=True)
class ModelOptions:
    """The model to run, and how."""

    model: str
    dtype: str | None  # default the checkpoint's
    kernels: str
    device: str | None
    revision: str | None
    adapter: Path | None
    timeout: float  # seconds that a rank waits for the others

    @classmethod
    def parsed(cls, arguments: argparse.Namespace) -> ModelOptions:
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a directory, a .gguf file, a Hugging Face hub id, or demo"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a LoRA adapter of PEFT, added to the weights"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="default: the checkpoint's")
    parser.add_argument(
        "--kernels",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="auto: Triton kernels on CUDA, their PyTorch references elsewhere",
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="end if a rank does not answer the others for so long (default 60)",
    )


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


def add_stop_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end before this text (\n is a line break); may be repeated",
    )


def stop_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    return tuple(map(_with_line_breaks, arguments.stop))


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True)
    add_form_arguments(parser, "the prompt is a user's chat message")


def add_form_arguments(parser: argparse.ArgumentParser, chat_help: str) -> None:
    """For commands that are given prompts or pairs: see `PromptForm`."""
    parser.add_argument("--chat", action="store_true", help=chat_help)
    parser.add_argument("--system", metavar="TEXT", help="the system message of the chat")
    parser.add_argument(
        "--template",
        type=_template_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the chat template, VALUE as JSON if it is that, else as text; e.g. "
        "enable_thinking=false; may be repeated",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="names of special tokens in the given text are plain text, not those tokens; in a "
        "chat they always are",
    )


def form_of(arguments: argparse.Namespace) -> PromptForm:
    """The form that the arguments of `add_form_arguments` and --answer-prefix describe."""
    template = dict(arguments.template)
    if len(template) < len(arguments.template):
        raise ValueError("--template gives a variable twice: give each once")
    prefix = getattr(arguments, "answer_prefix", None)
    return PromptForm(
        chat=arguments.chat,
        answer_prefix=None if prefix is None else _with_line_breaks(prefix),
        system=arguments.system,
        template=template,
        plain=arguments.plain,
    )


def _template_variable(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _with_line_breaks(text: str) -> str:
    """A shell has no easy way to write a line break."""
    return text.replace("\\n", "\n")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    return Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)


def output_files(arguments: argparse.Namespace) -> list[OutputFile]:
    """The files of --out and --json."""
    return [*((path, check_format) for path in arguments.out), *json_files(arguments)]


def json_files(arguments: argparse.Namespace) -> list[OutputFile]:
    """The file of --json, which may have any ending."""
    return [] if arguments.json is None else [(arguments.json, lambda path: None)]

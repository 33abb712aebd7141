"""What every command needs: the ranks, the model, a terminal on rank 0, checked output files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .engine.files import check_writable
from .engine.lens_spec import LensSpec
from .engine.plan import DeviceType, check_fits, device_memory_bytes, plan
from .engine.sampling import Sampling
from .interp.trace_files import check_format
from .interp.trace_table import WIDTH
from .kernels.dispatch import IMPLEMENTATIONS, set_implementation
from .model.config import DTYPE_BYTES, ModelConfig, torch_dtype
from .model.load import default_device, load
from .model.points import Tap
from .model.transformer import Transformer
from .parallel.collectives import agreed
from .parallel.group import TensorParallel
from .tokenizer.tokenizer import Tokenizer

# raises ValueError for a path whose ending cannot be written
CheckFile = Callable[[Path], None]
# (config, tokenizer) -> (positions of the prompt, positions in all, the lens): see `open_session`
NeedsFn = Callable[[ModelConfig, Tokenizer], tuple[int, int, LensSpec | None]]


@dataclass
class Session:
    """A loaded model, and where rank 0 prints: `console` is silent on the other ranks."""

    model: Transformer
    tokenizer: Tokenizer
    parallel: TensorParallel
    console: Console

    @property
    def prints(self) -> bool:
        return self.parallel.rank == 0


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


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    return Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def add_chat_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's chat message")


def open_session(
    arguments: argparse.Namespace, needs: NeedsFn, files: Sequence[tuple[Path, CheckFile]] = ()
) -> Session:
    """Join the ranks, check the output files, load the model if what it `needs` fits.

    files: what is to be written beside --json. Raises ValueError on every rank.
    """
    set_implementation(arguments.kernels)
    device = _device(arguments.device)
    parallel = TensorParallel.from_env(device)
    console = Console(highlight=False, quiet=parallel.rank != 0, width=_width())
    with agreed(parallel):
        _check_outputs([*files, *((path, _any_ending) for path in json_files(arguments))], parallel)
    dtype = torch_dtype(arguments.dtype) if arguments.dtype else None
    local = None if device is None or device.type == "cuda" else device
    with progress("loading", shown=parallel.rank == 0) as on_progress:
        model, tokenizer = load(
            arguments.model,
            parallel=parallel,
            dtype=dtype,
            device=local,
            check=_fit_check(arguments, needs, parallel.size, local),
            on_progress=on_progress,
        )
    return Session(model, tokenizer, parallel, console)


def _fit_check(
    arguments: argparse.Namespace, needs: NeedsFn, ranks: int, device: torch.device | None
) -> Callable[[ModelConfig, Tokenizer], None]:
    """What refuses a run that this rank's device has no memory for."""

    def check(config: ModelConfig, tokenizer: Tokenizer) -> None:
        own = default_device() if device is None else device
        n_prompt, context, spec = needs(config, tokenizer)
        if spec is not None:
            spec.check(config)
        taps = () if spec is None else spec.taps(config)
        kind: DeviceType = "cuda" if own.type == "cuda" else "cpu"
        planned = plan(
            config,
            ranks=ranks,
            context=context,
            taps=len(taps),
            final_tapped=Tap(config.n_layers - 1, "resid_post") in taps,
            top_k=1 if spec is None else spec.top_k,
            dtype=arguments.dtype,
            device_type=kind,
            deferred=spec is not None and spec.mode == "deferred",
            prompt=n_prompt,
            reads_prompt=spec is not None and spec.positions in ("all", "prompt"),
            # no step runs for the first new token, nor in commands that have no such option
            capture=context > n_prompt + 1 and not arguments.eager,
        )
        check_fits(planned, device_memory_bytes(own), str(arguments.model))

    return check


def _device(name: str | None) -> torch.device | None:
    try:
        device = None if name is None else torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name} does not exist: give cpu or cuda") from None
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available on this machine")
    return device


def _width() -> int | None:
    """A file or pipe has no width of its own; rich would take 80."""
    return None if Console().is_terminal else WIDTH


def trace_files(arguments: argparse.Namespace) -> list[tuple[Path, CheckFile]]:
    """Those of --out."""
    return [(path, check_format) for path in arguments.out]


def json_files(arguments: argparse.Namespace) -> list[Path]:
    return [] if arguments.json is None else [arguments.json]


def _any_ending(path: Path) -> None:
    pass


def _check_outputs(files: Sequence[tuple[Path, CheckFile]], parallel: TensorParallel) -> None:
    for path, check in files:
        check(path)
        if parallel.rank == 0:
            check_writable(path)


@contextmanager
def progress(label: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal, fed by the function it gives: (done, total)."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda done, total: None
        return
    columns = (TextColumn(label), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, as a user's message of a chat if asked. Refuses an empty one."""
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")
    return (
        tokenizer.chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    )


def run_needs(arguments: argparse.Namespace, spec: LensSpec | None) -> NeedsFn:
    """Of a run that continues one prompt by --max-new-tokens under a lens."""

    def needs(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, int, LensSpec | None]:
        n_prompt = len(prompt_ids(tokenizer, arguments.prompt, chat=arguments.chat))
        return n_prompt, n_prompt + max(0, arguments.max_new_tokens), spec

    return needs

"""The needs of every command: ranks, the model's files, a terminal on rank 0, a model that fits.

A command reads its inputs with an open session, then has the session load the model for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .engine.files import check_outputs
from .engine.fit import Target, plan_requests
from .engine.plan import check_fits, device_memory_bytes
from .engine.request import Request
from .interp.labels import PromptForm, encode_prompt
from .kernels.dispatch import set_implementation
from .language_model import LanguageModel
from .model.config import ModelConfig, torch_dtype
from .model.load import default_device, load_model
from .model.model_files import ModelFiles
from .model.source import find_model
from .options import ModelOptions, OutputFile
from .parallel.collectives import agreed
from .parallel.group import TensorParallel
from .stop_text import stop_texts
from .terminal import open_console, print_running
from .tokenizer.tokenizer import Tokenizer
from .tokenizer.visible import one_line


@dataclass
class Session:
    """The files of a model, read but for the weights, and where rank 0 prints.

    `console` is silent on the other ranks.
    """

    options: ModelOptions
    files: ModelFiles
    config: ModelConfig
    tokenizer: Tokenizer
    parallel: TensorParallel
    device: torch.device
    console: Console

    @property
    def prints(self) -> bool:
        return self.parallel.rank == 0

    def encode_prompt(self, prompt: str, form: PromptForm) -> list[int]:
        """Token ids of a prompt, in a chat as a user's message. Refuses an empty one."""
        with agreed(self.parallel):
            if not prompt:
                raise ValueError("the prompt is empty: give at least one character")
            ids = encode_prompt(self.tokenizer, prompt, form)
            if not ids:
                raise ValueError("the chat template writes nothing for this prompt")
            return ids

    def check_stop(self, stop: Sequence[str]) -> None:
        """Refuse stop texts that no text can hold, before the model is loaded."""
        with agreed(self.parallel):
            stop_texts(self.tokenizer, stop)

    def print_prompt(self, prompt: str, form: PromptForm) -> None:
        """Print what a text continues: the prompt, or a line for each turn and the reply's name."""
        if not form.chat:
            self.print_text(prompt, style="dim")
            return
        for message in form.messages(prompt):
            self.print_text(f"{message['role']}: ", style="bold")
            self.print_text(f"{message['content']}\n", style="dim")
        self.print_text("assistant: ", style="bold")

    def warn(self, line: str) -> None:
        """Print a warning on standard error, where no result is, on rank 0."""
        if self.prints:
            print(f"shardlens: warning: {one_line(line)}", file=sys.stderr)

    def print_text(self, text: str, style: str = "") -> None:
        """Print a text with its hidden characters made visible, and stay on its last line."""
        print_running(text, self.console, style)

    def load(self, requests: Sequence[Request], *, capture: bool = True) -> LanguageModel:
        """The model, if the requests fit beside it, all at once.

        Texts that are only read count as requests for no new token. Raises ValueError, on every
        rank, before any memory is taken for weights.
        """
        dtype = self.config.dtype if self.options.dtype is None else torch_dtype(self.options.dtype)
        target = Target(self.parallel, self.device, dtype)
        with agreed(self.parallel):
            planned = plan_requests(
                self.config, requests, target, batch=len(requests), capture=capture
            )
            check_fits(planned, device_memory_bytes(self.device), self.options.model)
        # After all ranks have checked: a rank that loads early would leave the others less memory.
        with progress("loading", shown=self.prints) as on_progress:
            model = load_model(
                self.files,
                parallel=self.parallel,
                dtype=dtype,
                device=self.device,
                on_progress=on_progress,
            )
        return LanguageModel(model, self.tokenizer)


def open_session(options: ModelOptions, files: Sequence[OutputFile] = ()) -> Session:
    """Join the ranks, check the output files, and read what comes with the model's weights.

    files: the output files of the command, each with a function that refuses endings it cannot
    have. Raises ValueError on every rank.
    """
    set_implementation(options.kernels)
    asked = _device(options.device)
    parallel = TensorParallel.from_env(asked, options.timeout)
    with agreed(parallel):
        for path, check in files:
            check(path)
        if parallel.rank == 0:
            check_outputs(path for path, _ in files)
    model_files = find_model(
        options.model, parallel, revision=options.revision, adapter=options.adapter
    )
    with agreed(parallel):
        config, tokenizer = model_files.config, model_files.tokenizer()
    return Session(
        options,
        model_files,
        config,
        tokenizer,
        parallel,
        default_device() if asked is None or asked.type == "cuda" else asked,
        open_console(quiet=parallel.rank != 0),
    )


def _device(name: str | None) -> torch.device | None:
    try:
        device = None if name is None else torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name} does not exist: give cpu or cuda") from None
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available on this machine")
    return device


@contextmanager
def progress(label: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal, moved by the function it gives: (done, total)."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda done, total: None
        return
    columns = (TextColumn(label), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

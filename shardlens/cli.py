"""The command line: `python -m shardlens COMMAND`, alone or on ranks that a launcher starts.

Every rank runs the same command on the same arguments; rank 0 alone prints and writes files.
Exit codes: 0 done, also for a reader that left early; 2 bad input (one line says what); 3 on a rank
that another one left alone; 130 after Ctrl-C; 1 anything else, such as a full disk (one line, too).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .engine.files import WriteError
from .output import lasting_output
from .tokenizer.visible import one_line

# Each is a module NAME_command, imported only when it is asked for: most bring torch.
COMMANDS = {
    "lens": "what each layer would have said at each position",
    "generate": "continue a prompt",
    "steer": "vectors from pairs of answers, applied and measured",
    "plan": "does a model fit, and how fast can it be at most",
    "model": "fetch a small trained model",
    "bench": "measure this machine",
}

REFUSED, LOST_CONTACT, UNWRITTEN, INTERRUPTED = 2, 3, 4, 130  # exit codes

MOST_SAID = 1200  # characters of an error

# torchrun answers 1 for whatever code its ranks end with. A launcher that wants the true code
# names a file here; then a rank that refuses bad input writes its code there and ends with 0.
EXIT_CODE_FILE = "SHARDLENS_EXIT_CODE_FILE"


def is_printing_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser(asked: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command `asked`; the other commands are only listed."""
    parser = _Parser(
        prog="shardlens",
        description="Read and steer LLaMA and Qwen models too large for one GPU, while they run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        if name == asked:
            import_module(f".{name}_command", __package__).add_to(commands)
        else:
            commands.add_parser(name, help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    asked = next((word for word in words if not word.startswith("-")), None)
    try:
        with lasting_output():
            with _interrupts_at_once():
                parser = build_parser(asked)
            arguments = parser.parse_args(words)
            arguments.run(arguments)
    except ValueError as error:
        return _refuse(str(error), REFUSED)
    except WriteError as error:
        # the launcher, which is told that a line was printed, makes it 1 as well
        return _refuse(str(error), UNWRITTEN if _is_launched() else 1)
    except KeyboardInterrupt:
        return _end_alone(INTERRUPTED, "interrupted")
    except RuntimeError as error:
        if not _has_lost_contact(error):
            raise
        return _end_alone(LOST_CONTACT, "another rank is gone, or does not answer")
    finally:
        # After an error of this rank alone the others may wait in a collective: tearing the group
        # down would wait for them, leaving lets them see the closed connection.
        if sys.exc_info()[0] is None:
            _leave_ranks()
    return 0


@contextmanager
def _interrupts_at_once() -> Iterator[None]:
    """For imports: some of them would swallow a KeyboardInterrupt, and go on."""
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is not signal.default_int_handler:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        os.write(2, b"shardlens: interrupted\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_launched() -> bool:
    """Whether this is a rank of `launcher.py`, which has a line for the user itself."""
    return "SHARDLENS_RENDEZVOUS" in os.environ


def _has_lost_contact(error: RuntimeError) -> bool:
    if "torch.distributed" not in sys.modules:
        return False
    from .parallel.group import is_lost_contact

    return is_lost_contact(error)


def _end_alone(code: int, line: str) -> int:
    """End this rank, whatever the others do. The launcher has its own line for the user."""
    if not _is_launched():
        number = os.environ.get("RANK")
        print(f"shardlens: {'' if number is None else f'rank {number}: '}{line}", file=sys.stderr)
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        # taking the group down would wait for the others, and abort where they are gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _leave_ranks() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


def _shortened(line: str) -> str:
    """A line that may repeat a word of any length, with its beginning and its end."""
    return line if len(line) <= MOST_SAID else f"{line[: MOST_SAID - 300]} ... {line[-300:]}"


def _refuse(message: str, code: int) -> int:
    if is_printing_rank():
        with suppress(OSError):  # nobody may be there to read it
            print(f"shardlens: {_shortened(one_line(message))}", file=sys.stderr, flush=True)
    code_file = os.environ.get(EXIT_CODE_FILE)
    if code_file is None:
        return code
    Path(code_file).write_text(str(code))
    return 0

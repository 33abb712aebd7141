"""Results: what each says of machine and code, what is claimed of it, and how it is kept.

A result is printed as one JSON line and kept as a file; that of a long stage is a `Journal`, whole
at every moment, whatever ends the stage.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..engine import GPUS
from ..engine.files import write_json

RESULTS = Path(__file__).parent / "results"
# Names that drivers give to the cards whose data sheet `GPUS` quotes. Others of the family (PCIe,
# NVL) have other memory, so that a name must match whole.
CARDS = {
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX A6000": "rtx-a6000",
}
# Words of a device's name that do not tell one card from another: makers, and kinds of memory.
DROPPED_WORDS = r"nvidia|geforce|tesla|generation|\d+gb|hbm\d*\w?|sxm\d*"
REHEARSAL = "cpu-rehearsal"  # decides nothing


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, for the head of a result."""
    cuda = torch.cuda.is_available()
    return {
        "hardware": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def nominal_bandwidth_bytes_per_s(device_name: str) -> float | None:
    """The memory's, from the card's data sheet; None for a card that is not known."""
    known = CARDS.get(device_name)
    return None if known is None else GPUS[known].bandwidth_bytes_per_s


def bandwidth_shares(
    bytes_per_s: float, copy_bytes_per_s: float, device: torch.device
) -> dict[str, float | None]:
    """The shares of what a copy on this machine was measured to move, and of the data sheet.

    A copy reaches about nine tenths of the latter, so a figure says which of the two it is of.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    nominal = nominal_bandwidth_bytes_per_s(name)
    return {
        "copy_bandwidth_share": bytes_per_s / copy_bytes_per_s,
        "nominal_bandwidth_share": None if nominal is None else bytes_per_s / nominal,
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Short hash of the checkout, with "+" where files differ from it; None outside one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with --save, for a benchmark that is run as a program."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", metavar="NAME", help="keep the result in bench/results/NAME.json")
    return parser


def emit(result: dict[str, Any], save_as: str | None) -> None:
    """Print the result as one JSON line; keep it under bench/results/ if a name is given."""
    print(json.dumps(result))
    if save_as is not None:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"{save_as}.json", result)


def verdict(
    claim: str, figure: float | None, target: float | None, below: bool = False, unit: str = ""
) -> dict[str, Any]:
    """A claim, its figure, and whether it reaches the target (or, if `below`, stays under it).

    Without a target or a figure nothing is decided.
    """
    met = None
    if figure is not None and target is not None:
        met = figure < target if below else figure >= target
    head = {"claim": claim, "figure": figure, "target": target}
    return head | {"below": below, "unit": unit, "met": met}


def print_verdicts(found: Sequence[dict[str, Any]]) -> None:
    """A line for each; a verdict over several cases has their numbers and the worst of them."""
    for claim in found:
        figure, target, unit = (claim[name] for name in ("figure", "target", "unit"))
        undecided = "no target" if target is None else "not decided"
        word = {True: "met", False: "NOT MET", None: undecided}[claim["met"]]
        bound, cases = "", ""
        if target is not None:
            bound = f"{'below' if claim['below'] else 'at least'} {_amount(target, unit)}"
        if "of" in claim:
            cases = f"{claim['measured']} of {claim['of']}  {claim['worst_case'] or ''}"
        print(
            f"{claim['claim']:76}{'-' if figure is None else _amount(figure, unit):>10}  "
            f"{bound:18}{word:13}{cases}".rstrip()
        )


def _amount(value: float, unit: str) -> str:
    return f"{value:.2%}" if unit == "%" else f"{value:.3g}{unit}"


def figure_or_none(width: float, height: float) -> Any:
    """A figure of so many inches. Without matplotlib there is none, and a line says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: it needs matplotlib (pip install 'shardlens[plot]')")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def card(device_name: str | None) -> str:
    """A card's name in files, such as h100 or rtx-4090; without a device, that of a rehearsal."""
    if device_name is None:
        return REHEARSAL
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    return "-".join(w for w in words if not re.fullmatch(DROPPED_WORDS, w)) or "gpu"


class Journal:
    """Results so far. `finished` is false till the end, and `in_progress` says what was begun."""

    def __init__(self, path: Path, **head: Any) -> None:
        self.path = path
        self._started = time.monotonic()
        self.content: dict[str, Any] = {
            **head,
            "finished": False,
            "in_progress": None,
            "failed": {},
            "red": {},
        }
        self.write()

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self._started, 1)
        write_json(self.path, _finite(self.content))

    def record(self, **results: Any) -> None:
        self.content |= results
        self.write()

    def now(self, what: str) -> None:
        """Record what comes next."""
        self.record(in_progress=what)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A block whose failure is recorded, and ends nothing else."""
        outer = self.content["in_progress"]
        self.now(name)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            doing = self.content["in_progress"]
            self.content["failed"][doing] = first_line(error)
            print(f"FAILED {doing}: {first_line(error)}", file=sys.stderr, flush=True)
        self.record(in_progress=outer)

    def add_red(self, what: str, *found: str) -> None:
        """A test or check that failed; what it tests is not reported."""
        self.content["red"].setdefault(what, []).extend(found)
        for text in found:
            print(f"RED {what}: {text}", flush=True)
        self.write()

    def finish(self) -> int:
        """An exit code: 1 if something failed or is red."""
        self.record(finished=True)
        return int(bool(self.content["failed"] or self.content["red"]))


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def is_finished(path: Path) -> bool:
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


def mark_end(path: Path, how: str) -> None:
    """Write into the file of a stage that did not finish how it ended."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {"finished": False} | content | {"ended": how})


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What every benchmark result says of the machine and the code that made it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..engine.files import write_json
from ..engine.plan import GPUS

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
    """Of the memory, from the card's data sheet; None for a card that is not known."""
    known = CARDS.get(device_name)
    return None if known is None else GPUS[known].bandwidth_bytes_per_s


def bandwidth_shares(
    bytes_per_s: float, copy_bytes_per_s: float, device: torch.device
) -> dict[str, float | None]:
    """Of what a copy on this machine was measured to move, and of the card's data sheet.

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


def emit(result: dict[str, Any], save_as: str | None) -> None:
    """Print the result as one JSON line; keep it under bench/results/ if a name is given."""
    print(json.dumps(result))
    if save_as is not None:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"{save_as}.json", result)


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Make VmHWM start again from what is resident now, after freed memory went back."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

"""Ranks that are processes and talk gloo, for what threads cannot stand for: compilers, DTensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def on_ranks(
    worker: Path, size: int, store: Path, *words: str, variables: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """The JSON lines that ranks print, in order of rank: `worker RANK SIZE STORE WORD...`."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment |= variables or {}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(size), str(store), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), outputs[0][1] or outputs[-1][1]
    return [json.loads(line) for stdout, _ in outputs for line in stdout.splitlines()]

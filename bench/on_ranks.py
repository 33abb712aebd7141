"""A benchmark's module on several ranks: each a process under torch.distributed.run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

# A rank's own error, which stands before torch.distributed.run's account of it.
RANK_ERROR = re.compile(r"^(?:\[rank\d+\]: )?(\w*Error: .*)", re.MULTILINE)


def on_ranks(ranks: int, module: str, words: list[str], threads: int) -> Any:
    """What `python -m MODULE WORDS --out FILE` hands over on so many ranks of so many threads.

    Raises ValueError with the first error that a rank printed where one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", module, *words, "--out", str(out)]
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            error = RANK_ERROR.search(run.stderr)
            raise ValueError(f"{ranks} ranks failed: {error[1] if error else 'no message'}")
        return json.loads(out.read_text())


def hand_over(result: Any, out: Path) -> None:
    """The end of such a module: the first rank writes what it found, and all leave the group."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        out.write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()

"""One stage of `bench.gpu`, in a process of its own: what breaks it leaves the others alone.

python -m shardlens.bench.gpu_stage STAGE --seconds S --file FILE [--truth FILE] [--shapes ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from . import gpu_end_to_end, gpu_kernels, gpu_truth
from .gpu_journal import Journal
from .gpu_process import exit_on_sigterm
from .kernels import full_environment

STAGES = ("truth", "claims", "end-to-end")
RESERVE_SHARE, RESERVE_SECONDS = 0.1, 20.0  # of the time, for what is in hand when it is over
SUMMED_UP = ("environment", "stage", "finished", "failed", "red", "claims", "seconds")


def run(stage: str, seconds: float, file: Path, truth: Path | None, shapes: list[str]) -> int:
    """An exit code: 1 if something failed or is red."""
    deadline = time.monotonic() + seconds - min(RESERVE_SECONDS, RESERVE_SHARE * seconds)
    journal = Journal(file, benchmark="gpu", stage=stage, environment=full_environment())
    if stage == "truth":
        gpu_truth.run(journal, deadline)
    elif stage == "claims":
        gpu_kernels.run(journal, deadline, truth)
    else:
        gpu_end_to_end.run(journal, deadline, truth, shapes)
    code = journal.finish()
    line = {name: journal.content[name] for name in SUMMED_UP if name in journal.content}
    print(json.dumps(line | {"file": str(file)}), flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--shapes", nargs="*", default=[])
    given = parser.parse_args()
    exit_on_sigterm()
    return run(given.stage, given.seconds, given.file, given.truth, given.shapes)


if __name__ == "__main__":
    sys.exit(main())

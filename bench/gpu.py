"""What a lent card is asked, in three stages that each fit ten minutes.

    python -m shardlens.bench.gpu [--stage truth|claims|end-to-end] [--minutes M] [--out FOLDER]

    truth       tests of the kernels, time of a decode step by kernel, captured against eager steps
    claims      every kernel beside its rivals, at the shapes that claims are made of
    end-to-end  whole generations beside transformers and the paper's method

Each stage writes FOLDER/CARD-STAGE.json, such as h100-truth.json, anew after every step: however it
ends, the file is whole and has everything so far. Without `--stage` all three share the minutes.
A red test or check drops the figures of what it tests, and the file names it. Exit code 1 if a
stage did not come to its end, or found something red or failing.

Without a GPU the same steps run in small, and decide nothing: a rehearsal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .gpu_journal import card, is_finished, mark_end
from .gpu_process import ENVIRONMENT, GRACE_SECONDS, Group, ended, exit_on_sigterm
from .gpu_stage import STAGES
from .models import CPU_SHAPES, N_LAYERS
from .report import RESULTS

MINUTES_PER_STAGE = 9.0
TIME_SHARES = {"truth": 0.3, "claims": 0.35, "end-to-end": 0.35}
LEAST_MINUTES = 0.5
# In a process of its own: this one is to hold no memory of the card while stages run.
ASK_DEVICE = "import torch as t; print(t.cuda.get_device_name() if t.cuda.is_available() else '')"


def device_name() -> str | None:
    """Of the first GPU, if there is one."""
    found = subprocess.run(
        [sys.executable, "-c", ASK_DEVICE],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return found.stdout.strip() or None


def run(stages: Sequence[str], minutes: float, out: Path, shapes: Sequence[str]) -> int:
    """An exit code: 1 if a stage did not come to its end, or found something red or failing."""
    deadline = time.monotonic() + 60 * minutes
    name = card(device_name())
    files = {stage: (out / f"{name}-{stage}.json").resolve() for stage in STAGES}
    worst = 0
    for at, stage in enumerate(stages):
        share = TIME_SHARES[stage] / sum(TIME_SHARES[later] for later in stages[at:])
        seconds = share * (deadline - time.monotonic()) - GRACE_SECONDS
        ran_tests = [files["truth"]] if "truth" in stages[:at] else []
        print(f"\nstage {stage}: {seconds:.0f} s, {files[stage]}", flush=True)
        if not run_stage(stage, seconds, files[stage], ran_tests, shapes):
            worst = 1
    return worst


def run_stage(
    stage: str, seconds: float, file: Path, ran_tests: Sequence[Path], shapes: Sequence[str]
) -> bool:
    """Whether it came to its end, with nothing red or failing."""
    file.unlink(missing_ok=True)  # what another run found would pass for this one's
    command = [sys.executable, "-m", f"{__package__}.gpu_stage", stage, "--file", str(file)]
    command += ["--seconds", str(seconds)]
    for truth in ran_tests:
        command += ["--truth", str(truth)]
    if shapes:
        command += ["--shapes", *shapes]
    code = Group(command).wait(time.monotonic() + seconds)
    if not is_finished(file):
        mark_end(file, ended(code))
        print(f"stage {stage} did not come to its end: {ended(code)}", flush=True)
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--minutes", type=float, help="for everything; default: 9 per stage")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--shapes", metavar="NAME,...", help="of end-to-end, in any order")
    given = parser.parse_args()
    stages = STAGES if given.stage is None else (given.stage,)
    minutes = MINUTES_PER_STAGE * len(stages) if given.minutes is None else given.minutes
    shapes = [] if given.shapes is None else given.shapes.split(",")
    if not minutes >= LEAST_MINUTES * len(stages):
        parser.error(f"--minutes {minutes:g}: at least {LEAST_MINUTES * len(stages):g} are needed")
    for shape in shapes:
        if shape not in (*N_LAYERS, *CPU_SHAPES):
            parser.error(f"shape {shape}: there are {', '.join((*N_LAYERS, *CPU_SHAPES))}")
    given.out.mkdir(parents=True, exist_ok=True)
    exit_on_sigterm()
    return run(stages, minutes, given.out, shapes)


if __name__ == "__main__":
    sys.exit(main())

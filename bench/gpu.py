"""Measurements of a card, in three stages that each fit ten minutes.

    python -m shardlens.bench.gpu [--stage truth|claims|end-to-end] [--minutes M] [--out FOLDER]

    truth       tests of the kernels, time of a decode step by kernel, captured against eager steps
    claims      every kernel beside its rivals, at the shapes that claims are made of
    end-to-end  whole generations beside transformers and the paper's method

Each stage is a process, so that what breaks it leaves the others alone. It writes
FOLDER/CARD-STAGE.json, such as h100-truth.json, anew after every step: however it ends, the file is
whole and has everything so far. Without `--stage` all three share the minutes.
A red test or check drops the figures of what it tests, and the file names it. Exit code 1 if a
stage did not come to its end, or found something red or failing.

Without a GPU the same steps run in small, and decide nothing: a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import gpu_claims, gpu_end_to_end, gpu_truth
from .kernel_report import full_environment
from .models import CPU_SHAPES, N_LAYERS
from .processes import ENVIRONMENT, GRACE_SECONDS, Program, ended, exit_on_sigterm
from .report import RESULTS, Journal, card, is_finished, mark_end

STAGES = ("truth", "claims", "end-to-end")
MINUTES_PER_STAGE = 9.0
TIME_SHARES = {"truth": 0.3, "claims": 0.35, "end-to-end": 0.35}
LEAST_MINUTES = 0.5
RESERVE_SHARE, RESERVE_SECONDS = 0.1, 20.0  # of the time, for what is in hand when it is over
SUMMED_UP = ("environment", "stage", "finished", "failed", "red", "claims", "seconds")
# In a process of its own: this one is to hold no memory of the card while stages run.
ASK_DEVICE = "import torch as t; print(t.cuda.get_device_name() if t.cuda.is_available() else '')"


def device_name() -> str | None:
    """The name of the first GPU, if there is one."""
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
    for number, stage in enumerate(stages):
        share = TIME_SHARES[stage] / sum(TIME_SHARES[later] for later in stages[number:])
        seconds = share * (deadline - time.monotonic()) - GRACE_SECONDS
        truth = files["truth"] if "truth" in stages[:number] else None
        print(f"\nstage {stage}: {seconds:.0f} s, {files[stage]}", flush=True)
        if not start_stage(stage, seconds, files[stage], truth, shapes):
            worst = 1
    return worst


def start_stage(
    stage: str, seconds: float, file: Path, truth: Path | None, shapes: Sequence[str]
) -> bool:
    """Whether it came to its end, with nothing red or failing. truth: see `run_stage`."""
    file.unlink(missing_ok=True)  # what another run found would pass for this one's
    command = [sys.executable, "-m", f"{__package__}.gpu", "--stage", stage, "--file", str(file)]
    command += ["--seconds", str(seconds)]
    command += [] if truth is None else ["--truth", str(truth)]
    command += ["--shapes", ",".join(shapes)] if shapes else []
    code = Program(command).wait(time.monotonic() + seconds)
    if not is_finished(file):
        mark_end(file, ended(code))
        print(f"stage {stage} did not come to its end: {ended(code)}", flush=True)
    return code == 0


def run_stage(
    stage: str, seconds: float, file: Path, truth: Path | None, shapes: Sequence[str]
) -> int:
    """One stage in this process; an exit code: 1 if something failed or is red.

    truth: the file of a stage that ran the tests on this very code, if there is one.
    """
    deadline = time.monotonic() + seconds - min(RESERVE_SECONDS, RESERVE_SHARE * seconds)
    journal = Journal(file, benchmark="gpu", stage=stage, environment=full_environment())
    if stage == "truth":
        gpu_truth.run(journal, deadline)
    elif stage == "claims":
        gpu_claims.run(journal, deadline, truth)
    else:
        gpu_end_to_end.run(journal, deadline, truth, shapes)
    code = journal.finish()
    line = {name: journal.content[name] for name in SUMMED_UP if name in journal.content}
    print(json.dumps(line | {"file": str(file)}), flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--minutes", type=float, help="for everything; default: 9 per stage")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--shapes", metavar="NAME,...", help="of end-to-end, in any order")
    # a stage's own process, as `start_stage` starts it
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--truth", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    shapes = [] if given.shapes is None else given.shapes.split(",")
    for shape in shapes:
        if shape not in (*N_LAYERS, *CPU_SHAPES):
            parser.error(f"shape {shape}: there are {', '.join((*N_LAYERS, *CPU_SHAPES))}")
    exit_on_sigterm()
    if given.file is not None:
        return run_stage(given.stage, given.seconds, given.file, given.truth, shapes)
    stages = STAGES if given.stage is None else (given.stage,)
    minutes = MINUTES_PER_STAGE * len(stages) if given.minutes is None else given.minutes
    if not minutes >= LEAST_MINUTES * len(stages):
        parser.error(f"--minutes {minutes:g}: at least {LEAST_MINUTES * len(stages):g} are needed")
    given.out.mkdir(parents=True, exist_ok=True)
    return run(stages, minutes, given.out, shapes)


if __name__ == "__main__":
    sys.exit(main())

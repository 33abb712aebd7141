"""Importing changes nothing that others see: no seeds, flags, handlers, environment or groups."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = [
    "shardlens.kernels",
    "shardlens.parallel",
    "shardlens.tokenizer",
    "shardlens.model",
    "shardlens.interp",
    "shardlens.engine",
    "shardlens",
    "shardlens.cli",
]
# Imports modules with all of their public names and prints what of the state that everyone shares
# has changed. torch's parts for sharded tensors come first: they bring sympy, which adds a filter.
PROGRAM = """
import importlib, logging, os, random, signal, sys, threading, warnings
import torch, torch.distributed as dist
import torch.distributed.fsdp, torch.distributed.tensor

def backend_flags():
    found = {}
    for name in ("cuda", "cuda.matmul", "cudnn", "mkldnn", "mha", "nnpack", "opt_einsum"):
        part = torch.backends
        for word in name.split("."):
            part = getattr(part, word)
        for flag in {*dir(part), *dir(type(part))}:
            try:
                value = getattr(part, flag)
            except (AttributeError, RuntimeError):  # of a library that is not there
                continue
            if isinstance(value, (bool, int, str, float)):
                found[f"{name}.{flag}"] = value
    return found

def state(known=None):
    loggers = logging.root.manager.loggerDict
    if known is None:
        known = {name for name, each in loggers.items() if isinstance(each, logging.Logger)}
    return known, {
        "default dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "seeds": (torch.get_rng_state().tolist(), torch.initial_seed(), random.getstate()),
        "groups": (dist.is_available() and dist.is_initialized(), torch.cuda.is_initialized()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "determinism": (torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision()),
        "flags": backend_flags(),
        "environment": dict(os.environ),
        "filters": (list(warnings.filters), warnings.showwarning),
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "paths": (list(sys.path), list(sys.meta_path), os.getcwd(), sys.getrecursionlimit()),
        "root logger": (logging.root.level, logging.root.handlers[:], logging.root.manager.disable),
        "loggers": {
            name: (loggers[name].level, loggers[name].handlers[:], loggers[name].propagate)
            for name in known
        },
    }

known, before = state()
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        getattr(module, public)
_, after = state(known)
print("; ".join(name for name in before if before[name] != after[name]))
"""


def changed_by(modules: list[str], folder: Path) -> str:
    command = [sys.executable, "-c", PROGRAM, *modules]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_has_no_effects(tmp_path: Path) -> None:
    assert changed_by(PACKAGES, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES[:5])
def test_importing_one_package_has_no_effects(package: str, tmp_path: Path) -> None:
    assert changed_by([package], tmp_path) == ""


def test_effects_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above could not fail."""
    (tmp_path / "spoils.py").write_text(
        "import logging, os, random, signal, sys, warnings, torch\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.manual_seed(1)\n"
        "torch.set_num_threads(torch.get_num_threads() + 1)\n"
        "torch.set_grad_enabled(False)\n"
        "torch.set_float32_matmul_precision('high')\n"
        "torch.backends.cudnn.benchmark = True\n"
        "os.environ['SPOILT'] = '1'\n"
        "warnings.simplefilter('ignore')\n"
        "sys.excepthook = print\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "sys.path.append('.')\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "logging.getLogger('torch').setLevel(logging.ERROR)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = changed_by(["spoils"], tmp_path).split("; ")
    assert {
        "default dtype and device",
        "seeds",
        "threads",
        "gradients",
        "determinism",
        "flags",
        "environment",
        "filters",
        "hooks",
        "signals",
        "paths",
        "root logger",
        "loggers",
    } == set(seen)

"""The wheel: what it holds, and that its kernels, layers and lens work where only torch is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_house import ORDER, ROOT, source_files

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    # a copy, because a build leaves build/ behind, which later builds would pack again
    source = shutil.copytree(ROOT, folder / "source", ignore=skipped)
    options = ["--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*PIP, "wheel", *options, str(source)], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_wheel_holds_everything(wheel: Path) -> None:
    """The wheel has every source file and the demo model, and nothing of the tests."""
    held = set(zipfile.ZipFile(wheel).namelist())
    for path in source_files(*ORDER):
        relative = path.relative_to(ROOT)
        name = str(relative) if relative.parts[0] == "shardlens" else f"shardlens/{relative}"
        assert name in held
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert f"shardlens/model/demo/{name}" in held
    assert not any("tests" in name or name.endswith(".pt") for name in held)


def needed(name: str, found: dict[str, Distribution] | None = None) -> dict[str, Distribution]:
    """A distribution and all that it requires here, by name."""
    found = {} if found is None else found
    if name not in found:
        found[name] = distribution(name)
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name, found)
    return found


def top_folders(package: Distribution) -> Iterator[Path]:
    """Its folders and files right in site-packages."""
    names = {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}
    yield from (Path(str(package.locate_file(name))) for name in names)


@pytest.fixture(scope="module")
def python_with_torch(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with torch, what torch requires, and the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for package in needed("torch").values():
        for path in top_folders(package):
            if not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(packages)]
    subprocess.run([*PIP, "install", *options, str(wheel)], check=True)
    return folder / "bin" / "python"


PROGRAM = """
import importlib.util, json, sys, torch
import shardlens.kernels, shardlens.parallel, shardlens.interp
from shardlens.interp import Unembedding
from shardlens.kernels import head_stats, rmsnorm_steer, swiglu
from shardlens.parallel import vocab_parallel_cross_entropy, vocab_slice
import torch.nn.functional as F

OTHERS = ("numpy", "safetensors", "tokenizers", "gguf", "rich", "huggingface_hub")
torch.manual_seed(0)
x, gain, weight = torch.randn(5, 8), torch.rand(8), torch.randn(13, 8, requires_grad=True)
targets = torch.arange(5)
logits = F.rms_norm(x, (8,), gain, 1e-5) @ weight.T
y, _ = rmsnorm_steer(x, gain, 1e-5)
head, _ = vocab_slice(weight)
loss = vocab_parallel_cross_entropy(y, head, targets)
loss.backward()
expected = torch.autograd.grad(F.cross_entropy(logits, targets), weight)[0]
best = head_stats(y, weight.detach(), k=3).rows.token_ids
read = Unembedding.of((gain, 1e-5, weight.detach())).read(x, top_k=3)
print(json.dumps({
    "origin": shardlens.kernels.__file__,
    "installed": [name for name in OTHERS if importlib.util.find_spec(name)],
    "errors": [
        float((y - F.rms_norm(x, (8,), gain, 1e-5)).abs().max()),
        float((swiglu(x) - F.silu(x[:, :4]) * x[:, 4:]).abs().max()),
        float((loss - F.cross_entropy(logits, targets)).abs()),
        float((weight.grad - expected).abs().max()),
    ],
    "best": [torch.equal(ids, logits.topk(3).indices) for ids in (best, read.token_ids)],
}))
"""


@pytest.mark.slow
def test_torch_is_enough_for_kernels_layers_and_lens(
    python_with_torch: Path, tmp_path: Path
) -> None:
    """Nothing else that shardlens requires is there, and each answers as torch does."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    command = [str(python_with_torch), "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["origin"].startswith(str(python_with_torch.parents[1]))
    assert found["installed"] == []
    assert max(found["errors"]) < 1e-6 and found["best"] == [True, True]

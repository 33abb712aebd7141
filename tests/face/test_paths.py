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
from shardlens.tokenizer import Tokenizer

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


TOO_LARGE = 65 << 20


def test_a_file_too_large(tmp_path: Path, capsys: Any) -> None:
    pairs = tmp_path / "p.jsonl"
    pairs.touch()
    os.truncate(pairs, TOO_LARGE)
    words = ["steer", "extract", "demo", "--pairs", str(pairs), "--out", str(tmp_path / "v.gguf")]
    assert main([*words, *CPU]) == 2
    assert "larger than 64 MiB" in capsys.readouterr().err


def test_files_too_large_for_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    os.truncate(tmp_path / "tokenizer.model", TOO_LARGE)
    with pytest.raises(ValueError, match=r"tokenizer\.model is larger than 64 MiB"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    (tmp_path / "chat_template.jinja").touch()
    os.truncate(tmp_path / "chat_template.jinja", TOO_LARGE)
    with pytest.raises(ValueError, match=r"chat_template\.jinja is larger than 64 MiB"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 at byte 1"):
        Tokenizer.from_directory(tmp_path)

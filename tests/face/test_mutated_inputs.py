"""Inputs of commands changed at random: pairs, vectors, traces, and the words themselves."""

from __future__ import annotations

import itertools
import json
import random
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutations import (
    Mutation,
    check_refusal,
    is_refused,
    limits,
    mutate_bytes,
    mutate_header,
    mutate_json,
    mutate_lines,
    mutate_words,
)

import shardlens
from shardlens.interp import Trace
from shardlens.model import DEMO

PAIRS = DEMO / "dispositions-cautious-bold.jsonl"


def write_pairs(path: Path) -> None:
    lines = PAIRS.read_text().splitlines()[:6]
    if path.suffix == ".json":
        path.write_text(json.dumps([json.loads(line) for line in lines]))
    else:
        path.write_text("\n".join(lines))


def write_vector(path: Path) -> None:
    words = ["steer", "extract", "demo", "--pairs", str(PAIRS), "--layers", "1-2"]
    assert shardlens.cli.main([*words, "--share", "0.05", "--out", str(path)]) == 0


def write_trace(path: Path) -> None:
    trace = shardlens.load("demo").lens("Anna is", top_k=2)
    trace.save(path)


EVAL = ["steer", "eval", "demo", "--layers", "1", "--share", "0.5", "--multipliers=-1,0,1"]
STEER = ["steer", "generate", "demo", "--prompt", "Anna is", "--max-new-tokens", "2", "--vector"]
# what is written, how it is changed, and the words before the file
KINDS: dict[str, tuple[str, Callable[[Path], None], Mutation, list[str]]] = {
    "pairs": ("x.jsonl", write_pairs, mutate_lines, [*EVAL, "--pairs"]),
    "array of pairs": ("x.json", write_pairs, mutate_json, [*EVAL, "--pairs"]),
    "pairs' bytes": ("x.jsonl", write_pairs, mutate_bytes, [*EVAL, "--pairs"]),
    "vector": ("x.safetensors", write_vector, mutate_header, STEER),
    "vector in gguf": ("x.gguf", write_vector, mutate_bytes, STEER),
}


def try_inputs(kind: str, seeds: range, folder: Path, capsys: Any) -> int:
    name, write, change, words = KINDS[kind]
    path, whole = folder / name, folder / f"whole{Path(name).suffix}"
    write(whole)
    capsys.readouterr()
    assert not is_refused([*words, str(whole)], capsys)
    n_refused = 0
    for seed in seeds:
        shutil.copy(whole, path)
        change(random.Random(f"{kind} {seed}"), path)
        try:
            n_refused += is_refused([*words, str(path)], capsys)
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}") from error
    assert len(list(folder.iterdir())) == 2
    return n_refused


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutated_inputs(kind: str, tmp_path: Path, capsys: Any) -> None:
    assert try_inputs(kind, range(10), tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_inputs(kind: str, tmp_path: Path, capsys: Any) -> None:
    assert try_inputs(kind, range(10, 60), tmp_path, capsys) > 5


def try_traces(seeds: range, folder: Path) -> int:
    whole, path, n_refused = folder / "whole.json", folder / "x.json", 0
    write_trace(whole)
    for seed in seeds:
        shutil.copy(whole, path)
        mutate_json(random.Random(f"trace {seed}"), path)
        try:
            with limits():
                trace = Trace.load(path)
                for ending in (".json", ".html"):
                    trace.save(folder / f"again{ending}")
        except ValueError as error:
            n_refused += 1
            check_refusal(f"shardlens: {error}\n")
    return n_refused


def test_some_mutated_traces(tmp_path: Path) -> None:
    assert try_traces(range(40), tmp_path) > 4


@pytest.mark.slow
def test_many_mutated_traces(tmp_path: Path) -> None:
    assert try_traces(range(40, 400), tmp_path) > 40


# Words

FORM = "--plain --top-k 2 --stop x --max-new-tokens 2"
EVAL_PAIRS = "steer eval demo --layers 1 --share 0.5 --multipliers=-1,0,1 --pairs PAIRS"
COMMANDS = [
    f"lens demo --prompt 'Anna is' --layers 0-1 --points resid_post,attn_out {FORM}",
    "lens demo --prompt 'Anna is' --target ' bear' --positions last --out OUT.html",
    "lens demo --prompt 'Anna is' --dtype float32 --kernels auto --timeout 60 --device cpu",
    f"generate demo --prompt 'Anna is' --temperature 1 --top-p 0.5 --seed 3 {FORM}",
    "generate demo --prompt 'Anna is' --max-new-tokens 1 --json OUT.json --eager",
    "steer generate demo --prompt 'Anna is' --max-new-tokens 2 --vector VECTOR --scale 1 2 "
    "--positions 5- --layers 1 --point resid_post --mode add --unit resid_norm --json OUT.json",
    f"{EVAL_PAIRS} --method pca --at label --seed 1",
    f"{EVAL_PAIRS} --contrast 'You are calm.' 'You are bold.' --json OUT",
    f"{EVAL_PAIRS} --vector VECTOR --protocol paper --unit vector",
    "steer extract demo --pairs PAIRS --layers 1 --out OUT.gguf --share 0.5 --answer-prefix A: "
    "--point resid_post --json OUT.json",
    "plan demo --ranks 1,2 --context 8 --batch 2 --layers all --points resid_post --top-k 3 "
    "--gpu-memory 80 --json OUT.json",
]


def try_words(seeds: range, folder: Path, monkeypatch: Any, capsys: Any) -> int:
    write_pairs(folder / "pairs.jsonl")
    write_vector(folder / "v.safetensors")
    capsys.readouterr()
    given = {"PAIRS": folder / "pairs.jsonl", "VECTOR": folder / "v.safetensors"}
    n_refused = 0
    for seed, command in zip(seeds, itertools.cycle(map(shlex.split, COMMANDS)), strict=False):
        out = folder / "out"
        out.mkdir()
        monkeypatch.chdir(out)  # some mutated words are names of files
        words = [str(given.get(word, word.replace("OUT", f"{out}/x"))) for word in command]
        words = mutate_words(random.Random(f"words {seed}"), words)
        try:
            refused = is_refused(words, capsys)
            assert not refused or not list(out.iterdir()), "leftovers"
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {words}") from error
        n_refused += refused
        shutil.rmtree(out)
    assert len(list(folder.iterdir())) == 2
    return n_refused


def test_some_mutated_words(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert try_words(range(44), tmp_path, monkeypatch, capsys) > 10


@pytest.mark.slow
def test_many_mutated_words(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert try_words(range(44, 264), tmp_path, monkeypatch, capsys) > 60

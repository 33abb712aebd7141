"""Files of a model changed at random: each runs rightly or is refused in one line with exit 2."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
)
from published import (
    copy_of_demo,
    with_adapter,
    with_index,
    with_jinja,
    with_merges,
    with_sentencepiece,
    with_template,
    write_gguf,
    write_rank_file,
)

from shardlens.tokenizer import Tokenizer


class Kind(NamedTuple):
    file: str
    change: Mutation
    prepare: Callable[[Path], object] = lambda folder: None
    chat: bool = False


def mutate_rank_file(chance: random.Random, path: Path) -> None:
    mutate_bytes(chance, path, within=chance.choice([300, 1_000_000]))


KINDS = {
    "config": Kind("config.json", mutate_json),
    "generation config": Kind("generation_config.json", mutate_json),
    "tokenizer": Kind("tokenizer.json", mutate_json),
    "tokenizer config": Kind("tokenizer_config.json", mutate_json, with_template),
    "named template": Kind("tokenizer_config.json", mutate_json, with_template, chat=True),
    "template": Kind("chat_template.jinja", mutate_lines, with_jinja, chat=True),
    "template's bytes": Kind("chat_template.jinja", mutate_bytes, with_jinja, chat=True),
    "vocab": Kind("vocab.json", mutate_json, with_merges),
    "merges": Kind("merges.txt", mutate_lines, with_merges),
    "merges' bytes": Kind("merges.txt", mutate_bytes, with_merges),
    "added tokens": Kind("added_tokens.json", mutate_json, with_merges),
    "sentencepiece": Kind("tokenizer.model", mutate_bytes, with_sentencepiece),
    "index": Kind("model.safetensors.index.json", mutate_json, with_index),
    "header": Kind("model.safetensors", mutate_header),
    "adapter's config": Kind("adapter/adapter_config.json", mutate_json, with_adapter),
    "adapter": Kind("adapter/adapter_model.safetensors", mutate_header, with_adapter),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with every file of a kind as it should be; made once."""
    made: dict[str, Path] = {}

    def prepare(kind: str) -> Path:
        if kind not in made:
            made[kind] = copy_of_demo(tmp_path_factory.mktemp("kinds") / "model")
            KINDS[kind].prepare(made[kind])
        return made[kind]

    return prepare


def try_files(kind: str, seeds: range, original: Path, folder: Path, capsys: Any) -> int:
    """How many of `lens` on mutated copies of a model are refused."""
    file, change, _, chat = KINDS[kind]
    n_refused = 0
    for seed in seeds:
        copy = Path(shutil.copytree(original, folder / str(seed)))
        change(random.Random(f"{kind} {seed}"), copy / file)
        words = ["lens", str(copy), "--prompt", "Anna is", "--device", "cpu"]
        words += ["--chat"] if chat else []
        words += ["--adapter", str(copy / "adapter")] if "adapter" in kind else []
        try:
            n_refused += is_refused(words, capsys)
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}") from error
        shutil.rmtree(copy)
    return n_refused


@pytest.mark.parametrize("kind", KINDS)
def test_as_they_should_be(
    kind: str, prepared: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    words = ["lens", str(prepared(kind)), "--prompt", "Anna is"]
    words += ["--chat"] if KINDS[kind].chat else []
    words += ["--adapter", str(prepared(kind) / "adapter")] if "adapter" in kind else []
    assert not is_refused(words, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutated_files(
    kind: str, prepared: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    assert try_files(kind, range(10), prepared(kind), tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files(
    kind: str, prepared: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    n_refused = try_files(kind, range(10, 60), prepared(kind), tmp_path, capsys)
    assert n_refused > 3


# A model in one file


def try_gguf(kind: str, seeds: range, folder: Path, capsys: Any) -> int:
    whole, path = folder / "whole.gguf", folder / "x.gguf"
    write_gguf(whole, kind)
    words = ["lens", str(path), "--prompt", "an an", "--device", "cpu"]
    shutil.copy(whole, path)
    assert not is_refused(words, capsys)
    n_refused = 0
    for seed in seeds:
        shutil.copy(whole, path)
        chance = random.Random(f"gguf {kind} {seed}")
        mutate_bytes(chance, path, within=chance.choice([100, 1200, 14_000]))
        try:
            n_refused += is_refused(words, capsys)
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}") from error
    return n_refused


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_some_mutated_ggufs(kind: str, tmp_path: Path, capsys: Any) -> None:
    assert try_gguf(kind, range(15), tmp_path, capsys) > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_many_mutated_ggufs(kind: str, tmp_path: Path, capsys: Any) -> None:
    assert try_gguf(kind, range(15, 150), tmp_path, capsys) > 20


# A vocabulary larger than the packaged model's


def try_rank_files(seeds: range, folder: Path) -> int:
    whole, path = folder / "whole", folder / "tokenizer.model"
    write_rank_file(whole)
    text, n_refused = "Anna is a bear \u00e9 <|eot_id|>", 0
    for seed in seeds:
        shutil.copy(whole, path)
        mutate_rank_file(random.Random(f"ranks {seed}"), path)
        try:
            with limits():
                tokenizer = Tokenizer.from_directory(folder)
                assert tokenizer.decode(tokenizer.encode(text), skip_special=False).endswith(text)
        except ValueError as error:
            n_refused += 1
            check_refusal(f"shardlens: {error}\n")
    return n_refused


def test_some_mutated_rank_files(tmp_path: Path) -> None:
    assert try_rank_files(range(6), tmp_path)


@pytest.mark.slow
def test_many_mutated_rank_files(tmp_path: Path) -> None:
    assert try_rank_files(range(6, 60), tmp_path) > 10

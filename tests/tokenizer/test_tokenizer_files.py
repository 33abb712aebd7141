"""The files of a directory that a tokenizer is read from, and what they say together."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from shardlens.tokenizer import Tokenizer

from .trained import EVERY_SCRIPT, TEXTS, byte_level_text

LLAMA2, QWEN3 = "tokenizers/llama2", "tokenizers/qwen3-hf"
CHATML = {"<|im_end|>": 32000, "<|im_start|>": 32001}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_small(folder: Path, **config: Any) -> None:
    (folder / "tokenizer.json").write_text(byte_level_text(), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)


def test_special_tokens_map_is_read_where_the_config_is_silent(tmp_path: Path) -> None:
    write_small(tmp_path, eos_token=None)
    write_json(
        tmp_path / "special_tokens_map.json", {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, None)


def test_tokens_that_only_the_config_adds(tmp_path: Path) -> None:
    n_vocab = Tokenizer.from_directory(_written(tmp_path)).n_vocab
    extra = {
        str(n_vocab + 1): {"content": "<y>", "special": False, "normalized": False},
        str(n_vocab): {"content": "<x><x>", "special": True},
    }
    write_small(tmp_path, added_tokens_decoder=extra)
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("<x><xx><x><x><xx><y>")
    shown = [tokenizer.token_text(id) for id in ids]
    assert shown == ["<x>", "<xx>", "<x><x>", "<xx>", "<y>"]
    assert tokenizer.special_ids == {0, 1, n_vocab}
    assert tokenizer.decode(ids) == "<x><xx><xx><y>"
    assert tokenizer.n_vocab == n_vocab + 2
    assert tokenizer.token_text(n_vocab + 2) == f"<{n_vocab + 2}>"


def _written(folder: Path) -> Path:
    write_small(folder)
    return folder


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ({"500": {"content": "<y>"}}, "'<y>' has id 500"),
        ({"x": {"content": "<y>"}}, "the id 'x', not a number"),
        ({"-1": {"content": "<y>"}}, "the id '-1', not a number"),
        ({"9" * 40: {"content": "<y>"}}, "the id '9{40}', not a number"),
        ({"400": {"content": ""}}, "id 400 has no content"),
        ({"400": "<y>"}, "id 400 has no content"),
        ([1], "is not a JSON object"),
    ],
)
def test_added_tokens_that_cannot_be(listed: Any, names: str, tmp_path: Path) -> None:
    write_small(tmp_path, added_tokens_decoder=listed)
    with pytest.raises(ValueError, match=names):
        Tokenizer.from_directory(tmp_path)


def test_added_tokens_json_beside_a_sentencepiece_model(shared_data: Path, tmp_path: Path) -> None:
    """The ChatML fine-tunes of Llama 2: one id for `<|im_start|>`, not seven."""
    shutil.copy(shared_data / LLAMA2 / "tokenizer.model", tmp_path)
    write_json(tmp_path / "added_tokens.json", CHATML)
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": True}
    write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids, spans = tokenizer.encode_with_spans("<|im_start|>user\nhi<|im_end|>\n")
    assert ids == [1, 32001, 1792, 13, 2918, 32000, 13]  # as transformers 5
    assert spans == [(0, 0), (0, 12), (12, 16), (16, 17), (17, 19), (19, 29), (29, 30)]
    assert tokenizer.eos_id == 32000 and tokenizer.n_vocab == 32002
    # named by the config as the EOS, so it stands for no text; the other one is a plain token
    assert tokenizer.special_ids == {0, 1, 2, 32000}
    plain = tokenizer.encode("<|im_start|>user<|im_end|>", special=False)
    assert plain[:2] == [1, 32001] and 32000 not in plain


@pytest.mark.parametrize("names", [{"": 5}, {"<y>": "5"}, {"<y>": -1}, {"<y>": True}, {"<y>": 1e3}])
def test_added_tokens_json_that_cannot_be(names: Any, shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / LLAMA2 / "tokenizer.model", tmp_path)
    write_json(tmp_path / "added_tokens.json", names)
    with pytest.raises(ValueError, match=r"added_tokens\.json: token .* has the id"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("legacy", [None, True, False])
def test_special_tokens_in_a_llama_2_text(legacy: Any, shared_data: Path, tmp_path: Path) -> None:
    """`<s>` in a text is id 1 for every kind; only under `legacy` is each stretch given a space."""
    shutil.copy(shared_data / LLAMA2 / "tokenizer.model", tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {} if legacy is None else {"legacy": legacy})
    tokenizer = Tokenizer.from_directory(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "tokenizer.model"), add_bos=False
    )
    ids = tokenizer.encode("<s>[INST] hi [/INST] yes </s><s>", bos=False)
    assert (ids[0], *ids[-2:]) == (1, 2, 1)
    middle = oracle.encode("[INST] hi [/INST] yes ")
    assert oracle.id_to_piece(middle[0]) == "\u2581["
    if legacy:
        assert ids[1:-2] == middle
    else:
        assert oracle.id_to_piece(ids[1]) == "["
    plain = tokenizer.encode("<s>[INST] hi", bos=False, special=False)
    assert plain == oracle.encode("<s>[INST] hi")


def test_sentencepiece_alone_decides_bos_and_eos_by_the_config(
    shared_data: Path, tmp_path: Path
) -> None:
    shutil.copy(shared_data / LLAMA2 / "tokenizer.model", tmp_path)
    bare = Tokenizer.from_directory(tmp_path).encode("hi", bos=False)
    for bos in (True, False):
        for eos in (True, False):
            config = {"add_bos_token": bos, "add_eos_token": eos}
            write_json(tmp_path / "tokenizer_config.json", config)
            ids = Tokenizer.from_directory(tmp_path).encode("hi")
            assert ids == [1] * bos + bare + [2] * eos
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": "false"})
    with pytest.raises(ValueError, match="add_bos_token is 'false', not true or false"):
        Tokenizer.from_directory(tmp_path)


def test_vocab_and_merges(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / QWEN3
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    apart, whole = Tokenizer.from_directory(tmp_path), Tokenizer.from_directory(source)
    for text in [*TEXTS, *EVERY_SCRIPT, "<|im_start|>user\n<think>a</think><|im_end|>"]:
        assert apart.encode_with_spans(text) == whole.encode_with_spans(text)
    assert (apart.bos_id, apart.eos_id) == (whole.bos_id, whole.eos_id)
    assert apart.special_ids == whole.special_ids and apart.n_vocab == whole.n_vocab


def test_vocab_and_merges_of_an_unknown_kind(shared_data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "vocab.json", {"a": 0, "b": 1, "ab": 2})
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"merges\.txt: how it splits .* put the .*tokenizer\.json"
    ):
        Tokenizer.from_directory(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "qwen3"})
    assert Tokenizer.from_directory(tmp_path).encode("abba") == [2, 1, 0]
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(ValueError, match="tokenizer_class 'LlamaTokenizer'"):
        Tokenizer.from_directory(tmp_path)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json, no tokenizer\.model, and no vocab"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(ValueError, match="absent is not a directory"):
        Tokenizer.from_directory(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b'{"a": ', "broken json"),
        (b"\xff{}", "is not UTF-8 at byte 0"),
        (b"[]", "a JSON object"),
        (b'{"a":' + b"[" * 100_000, "nested too deep"),
    ],
)
def test_broken_json(name: str, content: bytes, names: str, tmp_path: Path) -> None:
    write_small(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.* {names}"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["folder", "dangling link", "fifo"])
def test_a_file_that_is_none(name: str, kind: str, tmp_path: Path) -> None:
    """Not taken for absent, and not waited for."""
    write_small(tmp_path)
    path = tmp_path / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"{name} (is not a regular file|does not exist)"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("bad", ["<nope>", {"content": "<nope>"}])
def test_an_unknown_bos_token_is_named(bad: Any, tmp_path: Path) -> None:
    write_small(tmp_path, bos_token=bad)
    with pytest.raises(ValueError, match="bos_token '<nope>'"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("odd", [None, ""])
def test_a_token_without_a_name_is_none(odd: Any, tmp_path: Path) -> None:
    write_small(tmp_path, bos_token=odd, eos_token=odd, pad_token=odd)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


@pytest.mark.parametrize("odd", [[], 5, {}, True, {"content": 5}])
def test_a_token_of_another_type_is_refused(odd: Any, tmp_path: Path) -> None:
    write_small(tmp_path, eos_token=odd)
    with pytest.raises(ValueError, match=r"its eos_token is .*, not a token"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["special", "lstrip", "rstrip", "single_word", "normalized"])
def test_a_flag_of_another_type_is_refused(name: str, tmp_path: Path) -> None:
    write_small(tmp_path, added_tokens_decoder={"400": {"content": "<new>", name: "false"}})
    with pytest.raises(ValueError, match=f"{name} of the added token with id 400 is 'false', not"):
        Tokenizer.from_directory(tmp_path)

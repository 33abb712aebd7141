"""Tokenizers of every kind that `tokenizers` knows: its ids, exact spans, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from shardlens.tokenizer import Tokenizer

from .trained import (
    CORPUS,
    EVERY_SCRIPT,
    NORMALIZERS,
    PRE_TOKENIZERS,
    TEXTS,
    byte_level_text,
    piece_text,
)

BYTE_MODELS = [(name, "none") for name in PRE_TOKENIZERS] + [("llama3", n) for n in NORMALIZERS]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def both(text: str, folder: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return Tokenizer.from_directory(folder), tokenizers.Tokenizer.from_str(text)


@pytest.mark.parametrize(("pre_tokenizer", "normalizer"), BYTE_MODELS)
def test_bytes_as_tokenizers_reads_them(
    pre_tokenizer: str, normalizer: str, tmp_path: Path
) -> None:
    tokenizer, oracle = both(byte_level_text(pre_tokenizer, normalizer), tmp_path)
    assert tokenizer.n_vocab == oracle.get_vocab_size()
    for text in TEXTS + CORPUS + EVERY_SCRIPT:
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == oracle.encode(text).ids, text
        assert tokenizer.decode(ids, skip_special=False) == oracle.decode(
            ids, skip_special_tokens=False
        )
        if (pre_tokenizer, normalizer) in [("llama3", "none"), ("gpt2", "none")]:
            whole = b"".join(map(tokenizer.token_bytes, ids))
            assert whole == text.encode()
            assert_spells(tokenizer, text, ids, spans)


def assert_spells(
    tokenizer: Tokenizer, text: str, ids: list[int], spans: list[tuple[int, int]]
) -> None:
    """Each token is the text of its span, or bytes of the one character there."""
    for id, (start, end) in zip(ids, spans, strict=True):
        token = tokenizer.token_bytes(id)
        assert token in text[start:end].encode()
        assert token == text[start:end].encode() or token.decode("utf-8", "ignore") != token
    assert {at for start, end in spans for at in range(start, end)} == set(range(len(text)))


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("model", ["bpe with bytes", "bpe with unk", "unigram"])
def test_pieces_as_tokenizers_reads_them(model: str, scheme: str, tmp_path: Path) -> None:
    tokenizer, oracle = both(piece_text(model, scheme), tmp_path)
    for text in TEXTS + CORPUS + EVERY_SCRIPT:
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == oracle.encode(text).ids, text
        assert all(before[0] <= after[0] for before, after in itertools.pairwise(spans))
        if model == "bpe with bytes" and not unicodedata.category(text[:1] or "a").startswith("M"):
            assert tokenizer.decode(ids, skip_special=False) == oracle.decode(
                ids, skip_special_tokens=False
            )


@pytest.mark.parametrize("model", ["word pieces", "words"])
def test_words_as_tokenizers_reads_them(model: str, tmp_path: Path) -> None:
    tokenizer, oracle = both(piece_text(model), tmp_path)
    for text in TEXTS + CORPUS:
        assert tokenizer.encode(text) == oracle.encode(text).ids


def template(single: str, **specials: int) -> dict[str, Any]:
    """A post-processor; single: "bos $A eos" and the like."""
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if word == "$A"
        else {"SpecialToken": {"id": f"<|{word}|>", "type_id": 0}}
        for word in single.split()
    ]
    names = {
        f"<|{n}|>": {"id": f"<|{n}|>", "ids": [i], "tokens": [f"<|{n}|>"]}
        for n, i in specials.items()
    }
    return {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": names,
    }


POST_PROCESSORS: Mapping[str, Any] = {
    "none": None,
    "bos": template("bos $A", bos=0),
    "eos": template("$A eos", eos=1),
    "both": template("bos $A eos", bos=0, eos=1),
    "twice": template("bos bos $A", bos=0),
    "bytes": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    "sequence": {
        "type": "Sequence",
        "processors": [
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            template("bos $A eos", bos=0, eos=1),
        ],
    },
    "roberta": {
        "type": "RobertaProcessing",
        "sep": ["<|eos|>", 1],
        "cls": ["<|bos|>", 0],
        "trim_offsets": True,
        "add_prefix_space": False,
    },
}


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_the_post_processor_decides(name: str, add_bos_token: Any, tmp_path: Path) -> None:
    """Whatever `add_bos_token` of the config says, as with transformers 5."""
    spec = json.loads(byte_level_text()) | {"post_processor": POST_PROCESSORS[name]}
    config = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>"}
    write_json(tmp_path / "tokenizer_config.json", config | {"add_bos_token": add_bos_token})
    tokenizer, oracle = both(json.dumps(spec), tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    for text in TEXTS:
        full, bare = oracle.encode(text).ids, oracle.encode(text, add_special_tokens=False).ids
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == full and tokenizer.encode(text, bos=False) == bare
        n_before = next(at for at in range(3) if full[at : at + len(bare)] == bare)
        assert spans[:n_before] == [(0, 0)] * n_before
        assert "".join(text[start:end] for start, end in spans if text.isascii()) in (text, "")
        with_bos = tokenizer.encode(text, bos=True)
        assert with_bos[0] == 0 and with_bos[1:].count(0) == max(full.count(0) - 1, bare.count(0))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_of_added_tokens(flag: str, tmp_path: Path) -> None:
    spec = json.loads(byte_level_text())
    spec["added_tokens"][-1][flag] = True
    tokenizer, oracle = both(json.dumps(spec), tmp_path)
    for text in [*TEXTS, "a <xx> b", "a<xx>b", "a  <xx>", "<xx>  b <xx>"]:
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == oracle.encode(text).ids
        assert {at for s, e in spans for at in range(s, e)} == set(range(len(text)))


def test_merges_as_strings_and_as_pairs_are_the_same(tmp_path: Path) -> None:
    spec, ids = json.loads(byte_level_text()), []
    for form in (list, " ".join):
        spec["model"]["merges"] = [
            form(merge.split(" ") if isinstance(merge, str) else merge)
            for merge in spec["model"]["merges"]
        ]
        ids.append(both(json.dumps(spec), tmp_path)[0].encode(CORPUS[0]))
    assert ids[0] == ids[1] and len(ids[0]) < len(CORPUS[0])


def test_merges_out_of_the_order_of_their_ids(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "x": 6}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b", "b c", "a bc"]}
    byte_level = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), False)
    byte_level = {"type": "ByteLevel", **byte_level}
    spec = {"model": model, "pre_tokenizer": byte_level, "decoder": byte_level, "added_tokens": []}
    tokenizer, _ = both(json.dumps(spec), tmp_path)
    assert tokenizer.encode("abc") == [3, 2]
    model["ignore_merges"] = True
    tokenizer, _ = both(json.dumps(spec), tmp_path)
    assert tokenizer.encode("abc") == [5] and tokenizer.encode("xabc") == [6, 3, 2]


def test_a_file_that_cuts_and_pads_does_neither(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_str(byte_level_text())
    library.enable_truncation(3)
    library.enable_padding(length=20)
    tokenizer, oracle = both(library.to_str(), tmp_path)
    oracle.no_padding()
    oracle.no_truncation()
    assert tokenizer.encode(CORPUS[0]) == oracle.encode(CORPUS[0]).ids


@pytest.mark.parametrize("text", ["a\x04b", "漢", "né", "\U0001f469"])
def test_a_character_without_a_token_is_named_not_dropped(text: str, tmp_path: Path) -> None:
    """The library leaves such characters out without a word."""
    spec = json.loads(byte_level_text())
    kept = {t: i for t, i in spec["model"]["vocab"].items() if t.isascii() or t == "Ġ"}
    spec["model"] |= {
        "vocab": {token: number for number, token in enumerate(kept)},
        "merges": [],
    }
    spec["added_tokens"] = []
    tokenizer, oracle = both(json.dumps(spec), tmp_path)
    assert tokenizer.encode("the cat") == oracle.encode("the cat").ids
    assert oracle.decode(oracle.encode(text).ids) != text
    with pytest.raises(ValueError, match="has no token for") as caught:
        tokenizer.encode(text)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_added_token_spells_what_the_vocabulary_cannot(tmp_path: Path) -> None:
    spec = json.loads(byte_level_text())
    vocab = {t: i for t, i in spec["model"]["vocab"].items() if t.isascii()}
    spec["model"] |= {"vocab": {t: n for n, t in enumerate(vocab)}, "merges": []}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    spec["added_tokens"] = [{"id": len(vocab), "content": "<漢>", "special": True, **flags}]
    tokenizer, oracle = both(json.dumps(spec), tmp_path)
    assert tokenizer.encode("a<漢>") == oracle.encode("a<漢>").ids
    with pytest.raises(ValueError, match="has no token for '漢'"):
        tokenizer.encode("a<漢>", special=False)


def nested(name: str) -> Any:
    value: Any = {}
    for _ in range(240):
        value = {"type": "Sequence", name: [value]}
    return value


def set_model(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["model"].update(values)


def set_spec(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec.update(values)


def set_added(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["added_tokens"][-1].update(values)


def set_vocab(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["model"]["vocab"].update(values)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (set_model(dropout=0.1), "dropout 0.1"),
        (set_model(vocab=None), "cannot be read"),
        (set_model(merges=[["q", "z"]]), "cannot be read"),
        (set_model(type="Grammar"), "cannot be read"),
        (lambda spec: spec["model"]["vocab"].update({"the": 5}), "have the same id"),
        (set_vocab(zz="5"), "cannot be read"),
        (set_vocab(zz=-1), "cannot be read"),
        (set_vocab(zz=2**40), "cannot be read"),
        (set_spec(model=None), "no model"),
        (set_spec(model=[]), "no model"),
        (set_spec(normalizer="x"), "cannot be read"),
        (set_spec(normalizer=nested("normalizers")), "cannot be read"),
        (set_spec(post_processor=nested("processors")), "cannot be read"),
        (set_spec(added_tokens=[1]), "cannot be read"),
        (
            set_spec(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(?<=x"}}),
            "cannot be read",
        ),
        (set_spec(post_processor={"type": "TemplateProcessing", "single": {}}), "cannot be read"),
        (set_added(id=10**9), r"'<xx>' has id 1000000000"),
        (set_added(content="<x>"), "'<x>' has id"),
    ],
)
def test_a_json_that_cannot_be_run_is_refused(
    change: Callable[[dict[str, Any]], None], names: str, tmp_path: Path
) -> None:
    spec = json.loads(byte_level_text())
    change(spec)
    write_json(tmp_path / "tokenizer.json", spec)
    with pytest.raises(ValueError, match=names) as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """Any value of the file replaced by another kind of value; 300 files."""
    chance = random.Random(0)
    values: list[Any] = [None, True, -1, 1.5, 2**31, 10**30, "x", "", [], {}, [[]], {"type": "x"}]
    read = 0
    for _ in range(300):
        spec = json.loads(byte_level_text()) | {"post_processor": template("bos $A", bos=0)}
        at, key = spec, chance.choice(list(spec))
        while isinstance(at[key], (dict, list)) and at[key] and chance.random() < 0.8:
            at = at[key]
            key = chance.choice(list(at)) if isinstance(at, dict) else chance.randrange(len(at))
        at[key] = chance.choice(values)
        write_json(tmp_path / "tokenizer.json", spec)
        try:
            assert Tokenizer.from_directory(tmp_path).encode("the cat <x>") is not None
            read += 1
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert 50 < read < 290

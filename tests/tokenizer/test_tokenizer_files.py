"""A small trained tokenizer.json: the same ids as `tokenizers`, its rules, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from shardlens.tokenizer.tokenizer import Tokenizer

SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
CORPUS = [
    "the cat sat on the mat, and that was that: the end",
    "naïve café 漢字 漢語 👩‍💻 123 1234",
] * 3
TEXTS = [
    "",
    " ",
    "the cat",
    "  that naïve café\n\n漢字 👩‍💻 12345 thethethe",
    "<|bos|>the<|bos|><|bos|> end<|eos|>",
    "<x><xx><xxx>the <|bos|",
    "cafe\u0301<x>e\u0301",
]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@cache
def small_spec_text() -> str:
    """A byte-level tokenizer.json of some 400 tokens, trained by the `tokenizers` library."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(CORPUS, trainer)
    trained.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("<x>", "<xx>")])
    trained.decoder = tokenizers.decoders.ByteLevel()
    return str(trained.to_str())


@pytest.fixture
def spec() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(small_spec_text())
    return loaded


def template(name: str, id: int) -> dict[str, Any]:
    first = [{"SpecialToken": {"id": name, "type_id": 0}}] if name else []
    return {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}} if name else {},
    }


@pytest.mark.parametrize(
    "normalizer", [None, {"type": "Sequence", "normalizers": []}, {"type": "NFC"}]
)
@pytest.mark.parametrize("gpt2_pattern", [False, True])
def test_a_trained_tokenizer_agrees_with_tokenizers(
    gpt2_pattern: bool, normalizer: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    spec["normalizer"] = normalizer
    if gpt2_pattern:
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        spec["pre_tokenizer"] = json.loads(byte_level.__getstate__())
    write_json(tmp_path / "tokenizer.json", spec)
    tokenizer = Tokenizer.from_directory(tmp_path)
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.n_vocab == oracle.get_vocab_size()
    for text in TEXTS + CORPUS:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text).ids, text
        assert tokenizer.decode(ids) == oracle.decode(ids)
        assert tokenizer.decode(ids, skip_special=False) == oracle.decode(
            ids, skip_special_tokens=False
        )


def test_merges_as_strings_and_as_pairs_are_the_same(spec: dict[str, Any], tmp_path: Path) -> None:
    ids = []
    for form in (lambda pair: list(pair), " ".join):
        spec["model"]["merges"] = [
            form(merge.split(" ") if isinstance(merge, str) else merge)
            for merge in spec["model"]["merges"]
        ]
        write_json(tmp_path / "tokenizer.json", spec)
        ids.append(Tokenizer.from_directory(tmp_path).encode(CORPUS[0]))
    assert ids[0] == ids[1] and len(ids[0]) < len(CORPUS[0])


@pytest.mark.parametrize("in_sequence", [False, True])
@pytest.mark.parametrize(
    ("post", "add_bos_token", "expected"),
    [
        ("", "absent", False),
        ("<|bos|>", "absent", True),
        ("<|bos|>", None, True),
        ("<|bos|>", False, False),
        ("", True, True),
        ("", None, False),
    ],
)
def test_bos_rule_of_a_json(
    post: str,
    add_bos_token: Any,
    expected: bool,
    in_sequence: bool,
    spec: dict[str, Any],
    tmp_path: Path,
) -> None:
    processor = template(post, 0)
    sequence = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, processor]}
    spec["post_processor"] = sequence if in_sequence else processor
    write_json(tmp_path / "tokenizer.json", spec)
    config = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>"}
    if add_bos_token != "absent":
        config["add_bos_token"] = add_bos_token
    write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    bare = tokenizer.encode("the", bos=False)
    assert tokenizer.encode("the", bos=True) == [0, *bare]
    assert tokenizer.encode("the") == ([0, *bare] if expected else bare)


def test_a_bos_rule_without_a_bos_is_refused(spec: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", spec)
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": True})
    with pytest.raises(ValueError, match="no bos_token"):
        Tokenizer.from_directory(tmp_path)


def test_special_tokens_map_is_read_where_the_config_is_silent(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    write_json(tmp_path / "tokenizer.json", spec)
    write_json(
        tmp_path / "special_tokens_map.json", {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    )
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": None})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, None)


def test_added_tokens_the_longest_wins_and_only_special_ones_are_skipped(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    spec["added_tokens"].append(
        {"id": 500, "content": "<xx><x>", "special": True, "normalized": False}
    )
    write_json(tmp_path / "tokenizer.json", spec)
    extra = {"501": {"content": "<y>", "special": False}}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": extra})
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("<x><xx><x><xx><y>")
    assert [tokenizer.token_text(id) for id in ids] == ["<x>", "<xx><x>", "<xx>", "<y>"]
    assert tokenizer.special_ids == {0, 1, 500}
    assert tokenizer.decode(ids) == "<x><xx><y>"
    assert tokenizer.n_vocab == 502
    assert tokenizer.token_text(450) == "<450>"


def drop_byte(spec: dict[str, Any]) -> None:
    del spec["model"]["vocab"]["Ā"]


def swap_merges(spec: dict[str, Any]) -> None:
    merges = spec["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def add_unmade_token(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"]["zzzz"] = 450


def set_model(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["model"].update(values)


def set_spec(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec.update(values)


def set_added(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["added_tokens"][-1].update(values)


def set_step(place: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["pre_tokenizer"]["pretokenizers"][place].update(values)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (set_model(type="Unigram"), "'Unigram'.*sentencepiece"),
        (set_model(type="WordPiece"), "'WordPiece'"),
        (set_model(dropout=0.1), "dropout 0.1"),
        (set_model(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
        (set_model(vocab=None), "lacks a vocab"),
        (set_model(merges=[["q", "z"]]), "a merge makes 'qz'"),
        (swap_merges, "merge 1 makes id .* out of the order"),
        (add_unmade_token, "no merge makes token 'zzzz'"),
        (drop_byte, "no token for byte 0x00"),
        (set_spec(normalizer={"type": "NFKC"}), "normalizer 'NFKC'"),
        (set_spec(normalizer={"type": "Sequence", "normalizers": [{"type": "Strip"}]}), "'Strip'"),
        (set_spec(pre_tokenizer=None), r"not byte-level BPE \(model type 'BPE'\)"),
        (set_step(0, type="Digits"), "Digits"),
        (set_step(0, behavior="Removed"), "Split"),
        (set_step(0, invert=True), "Split"),
        (set_step(0, pattern={"String": " "}), "Split"),
        (set_step(0, pattern={"Regex": "(?<=x"}), "does not compile"),
        (set_step(0, pattern={"Regex": r"\p{L}+|\s+"}), "leaves out some characters"),
        (set_step(1, add_prefix_space=True), "add_prefix_space"),
        (set_step(1, use_regex=True), "use_regex"),
        (set_added(lstrip=True), "'<xx>' has lstrip"),
        (set_added(rstrip=True), "'<xx>' has rstrip"),
        (set_added(single_word=True), "'<xx>' has single_word"),
        (set_added(id=5), "'<xx>' has the id of another"),
        (set_added(content="<x>"), "'<x>' has two ids"),
        (set_spec(post_processor=template("<|eos|>", 1)), "begin with '<|eos|>'"),
    ],
)
def test_a_json_that_cannot_be_run_exactly_is_refused(
    change: Callable[[dict[str, Any]], None], names: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<|bos|>"})
    write_json(tmp_path / "tokenizer.json", spec)
    Tokenizer.from_directory(tmp_path)
    change(spec)
    write_json(tmp_path / "tokenizer.json", spec)
    with pytest.raises(ValueError, match=names.replace("|", r"\|")) as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json and no tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(ValueError, match="absent is not a directory"):
        Tokenizer.from_directory(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "names"), [(b'{"a": ', "broken json"), (b"\xff{}", "broken"), (b"[]", "object")]
)
def test_broken_json(
    name: str, content: bytes, names: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    write_json(tmp_path / "tokenizer.json", spec)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{names}"):
        Tokenizer.from_directory(tmp_path)


def test_an_unknown_bos_token_is_named(spec: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", spec)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<nope>"})
    with pytest.raises(ValueError, match="bos_token '<nope>'"):
        Tokenizer.from_directory(tmp_path)

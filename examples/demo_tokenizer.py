"""A small byte-level BPE trainer that writes a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex

BOS, EOS = "<|bos|>", "<|eos|>"

# Words carry the space before them; digits and punctuation stand apart from words.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Symbols = tuple[str, ...]


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[str, object]:
    """A `tokenizer.json` of at most `vocab_size` entries, learnt from `texts`.

    A stretch that the pattern cuts out counts by the square root of how often it occurs: a small
    world has few words, and each should become one token, the rare ones too.
    """
    counts = Counter(stretch for text in texts for stretch in regex.findall(PATTERN, text))
    alphabet = byte_alphabet()
    words = {
        tuple(alphabet[byte] for byte in stretch.encode()): count**0.5
        for stretch, count in counts.items()
    }
    vocab = [alphabet[byte] for byte in range(256)]
    merges: list[tuple[str, str]] = []
    while len(vocab) + 2 < vocab_size and (pair := _heaviest_pair(words)):
        merges.append(pair)
        vocab.append("".join(pair))
        words = {_merge(word, pair): weight for word, weight in words.items()}
    return tokenizer_json(vocab, merges)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _heaviest_pair(words: dict[Symbols, float]) -> tuple[str, str] | None:
    weights: Counter[tuple[str, str]] = Counter()
    for word, weight in words.items():
        for pair in pairwise(word):
            weights[pair] += weight  # type: ignore[assignment]
    # Ties go by spelling, so that the result does not depend on the order of the texts.
    return max(weights, key=lambda pair: (weights[pair], pair)) if weights else None


def _merge(word: Symbols, pair: tuple[str, str]) -> Symbols:
    merged: list[str] = []
    rest = iter(word)
    for symbol in rest:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def tokenizer_json(vocab: list[str], merges: list[tuple[str, str]]) -> dict[str, object]:
    """The file's content: ids in the order of `vocab`, then the two special tokens."""
    bos, eos = len(vocab), len(vocab) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    begin = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": bos, "content": BOS, **flags, "special": True},
            {"id": eos, "content": EOS, **flags, "special": True},
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(vocab)},
            "merges": merges,
        },
    }


def write_tokenizer(directory: Path, content: dict[str, object], context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, value in (("tokenizer", content), ("tokenizer_config", settings)):
        text = json.dumps(value, ensure_ascii=False, indent=1)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")

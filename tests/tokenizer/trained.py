"""Small tokenizers of every kind, trained by the `tokenizers` library, and texts to try on them."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

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
    "It's 3.14, isn't it?\tYes:\r\n  1,234 -- x_y <xx> <|eos|>",
]
# Characters of every script: of each 64, the first that is assigned.
EVERY_SCRIPT = [
    "".join(
        next((chr(c) for c in range(at, at + 64) if unicodedata.category(chr(c))[0] not in "C"), "")
        for at in range(start, start + 64 * 32, 64)
    )
    for start in range(0, 0x20000, 64 * 32)
]

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
BARE_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str, behavior: str, **flags: Any) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, **flags)


PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "llama3": pre_tokenizers.Sequence([split(SPLIT, "isolated"), BARE_BYTES]),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "splits": pre_tokenizers.Sequence(
        [split(r"[\r\n]", "isolated"), split(r"\s?\p{L}+", "isolated"), BARE_BYTES]
    ),
    "merged with next": pre_tokenizers.Sequence([split(r"\s", "merged_with_next"), BARE_BYTES]),
    "merged with previous": pre_tokenizers.Sequence(
        [split(r"\s", "merged_with_previous"), BARE_BYTES]
    ),
    "removed": pre_tokenizers.Sequence([split(r"\s", "removed"), BARE_BYTES]),
    "inverted": pre_tokenizers.Sequence([split(r"\p{L}+", "removed", invert=True), BARE_BYTES]),
    "no regex": BARE_BYTES,
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "punctuation": pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), BARE_BYTES]),
    "whitespace": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BARE_BYTES]),
    "scripts": pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), BARE_BYTES]),
}
NORMALIZERS = {
    "none": None,
    "empty": normalizers.Sequence([]),
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "lowercase": normalizers.Lowercase(),
    "strip": normalizers.Strip(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "replace": normalizers.Replace("the", "a"),
    "prepend": normalizers.Prepend("_"),
}


def added(text: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, normalized=False)


@cache
def byte_level_text(pre_tokenizer: str = "llama3", normalizer: str = "none") -> str:
    """A byte-level BPE tokenizer.json of some 400 tokens."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    if NORMALIZERS[normalizer] is not None:
        library.normalizer = NORMALIZERS[normalizer]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens([added("<x>"), added("<xx>")])
    library.decoder = tokenizers.decoders.ByteLevel()
    return str(library.to_str())


@cache
def piece_text(model: str, scheme: str = "first") -> str:
    """A tokenizer.json whose pieces are characters: of sentencepiece's kind, or words."""
    specials = ["<unk>", "<|bos|>", "<|eos|>"]
    if model == "bpe with bytes":
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
    common = {"special_tokens": specials, "show_progress": False, "vocab_size": 500}
    library, trainer = {
        "bpe with bytes": (
            tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)),
            trainers.BpeTrainer(min_frequency=1, **common),
        ),
        "bpe with unk": (
            tokenizers.Tokenizer(models.BPE(unk_token="<unk>")),
            trainers.BpeTrainer(min_frequency=1, **common),
        ),
        "unigram": (
            tokenizers.Tokenizer(models.Unigram()),
            trainers.UnigramTrainer(unk_token="<unk>", **common),
        ),
        "word pieces": (
            tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>")),
            trainers.WordPieceTrainer(min_frequency=1, **common),
        ),
        "words": (
            tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>")),
            trainers.WordLevelTrainer(**common),
        ),
    }[model]
    if model.startswith("word"):
        library.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        steps = [tokenizers.decoders.ByteFallback()] if model == "bpe with bytes" else []
        metaspace = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
        library.decoder = tokenizers.decoders.Sequence(
            [*steps, metaspace, tokenizers.decoders.Fuse()]
        )
    library.train_from_iterator(CORPUS, trainer)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(spec)

"""The tokenizer that a .gguf file holds, from its metadata.

"gpt2" is byte-level BPE, whose splitting the file only names (`pre`); "llama" is a sentencepiece
model taken apart, put together again for the sentencepiece library.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from .added import AddedToken
from .encoding import Encoder
from .hugging_face import HuggingFaceEncoder
from .split_rules import SPLITS, byte_level_spec
from .spm import SentencePieceEncoder
from .tokenizer import Tokenizer

# Kinds of tokens, the same in .gguf files and in sentencepiece's.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2  # sentencepiece's number of that model type


def gguf_tokenizer(metadata: Mapping[str, Any], origin: str) -> Tokenizer:
    """Returns the tokenizer of a file with this metadata; messages call the file `origin`.

    Raises ValueError, naming the file, for a kind or a splitting rule that is not known, and for
    lists that are broken.
    """
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    kind = keys.get("model")
    tokens = _tokens(keys, origin)
    if kind == "gpt2":
        encoder = _byte_level(keys, origin)
    elif kind == "llama":
        encoder = _sentencepiece(keys, origin)
    else:
        raise ValueError(
            f"{origin}: its tokenizer is of kind {kind!r}: only gpt2 and llama are read"
        )
    settings = {
        f"{name}_token": tokens[keys[key]]
        for name, key in _TOKEN_KEYS.items()
        if isinstance(keys.get(key), int) and 0 <= keys[key] < len(tokens)
    }
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        encoder,
        settings={"bos_token": None, "eos_token": None, **settings},
        origin=origin,
        chat_template=template if isinstance(template, str) else None,
    )


_TOKEN_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}


def _tokens(keys: Mapping[str, Any], origin: str) -> list[str]:
    """The tokens by id. Raises ValueError where they are broken, or their types are missing."""
    tokens: Any = keys.get("tokens")
    kinds: Any = keys.get("token_type")
    are_lists = isinstance(tokens, list) and isinstance(kinds, list) and len(tokens) == len(kinds)
    are_texts = are_lists and all(isinstance(token, str) for token in tokens)
    if not are_texts or not all(isinstance(kind, int) for kind in kinds):
        raise ValueError(f"{origin} has no tokens with their types; fetch the file again")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{origin}: two of its tokens have the same text; fetch the file again")
    return list(tokens)


def _byte_level(keys: Mapping[str, Any], origin: str) -> Encoder:
    rule = keys.get("pre", "default")
    if rule not in SPLITS:
        raise ValueError(
            f"{origin}: its tokenizer splits text by the rule {rule!r}: only "
            f"{', '.join(SPLITS)} are known"
        )
    if not isinstance(keys.get("merges"), list):
        raise ValueError(f"{origin} has no merges; fetch the file again")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": id, "content": token, "special": kind == _CONTROL, **flags}
        for id, (token, kind) in enumerate(zip(keys["tokens"], keys["token_type"], strict=True))
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    vocab = {token: id for id, token in enumerate(keys["tokens"])}
    spec = byte_level_spec(rule, vocab, keys["merges"], added)
    # as llama.cpp does where the file is silent
    adds_bos = keys.get("add_bos_token", rule == "llama-bpe")
    spec["post_processor"] = _template(
        [keys.get("bos_token_id")] if adds_bos else [],
        [keys.get("eos_token_id")] if keys.get("add_eos_token") else [],
        keys["tokens"],
        origin,
    )
    return HuggingFaceEncoder(spec, path=origin)


def _template(
    before: Sequence[Any], after: Sequence[Any], tokens: Sequence[str], origin: str
) -> dict[str, Any] | None:
    """A post-processor that puts tokens around a text."""
    ids = [*before, *after]
    if not ids:
        return None
    if not all(isinstance(id, int) and 0 <= id < len(tokens) for id in ids):
        raise ValueError(f"{origin}: a text is to begin or end with a token that is not there")

    def part(id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": tokens[id], "type_id": 0}}

    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*map(part, before), text, *map(part, after)],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            tokens[id]: {"id": tokens[id], "ids": [id], "tokens": [tokens[id]]} for id in ids
        },
    }


def _sentencepiece(keys: Mapping[str, Any], origin: str) -> Encoder:
    scores = keys.get("scores")
    if not isinstance(scores, list) or len(scores) != len(keys["tokens"]):
        raise ValueError(f"{origin} has no scores for its tokens; fetch the file again")
    proto = b"".join(
        _field(1, _field(1, token.encode()) + _field(2, float(score)) + _field(3, int(kind)))
        for token, score, kind in zip(keys["tokens"], scores, keys["token_type"], strict=True)
    )
    has_bytes = _BYTE in keys["token_type"]
    special = {41: "bos_token_id", 42: "eos_token_id", 40: "unknown_token_id"}
    trainer = _field(3, _BPE) + _field(35, int(has_bytes))
    for number, key in special.items():
        trainer += _field(number, int(keys[key])) if key in keys else _field(number, -1)
    proto += _field(2, trainer)
    prefixed = int(bool(keys.get("add_space_prefix", True)))
    proto += _field(3, _field(1, b"identity") + _field(3, prefixed) + _field(4, 0) + _field(5, 1))
    added = [
        AddedToken(id, token, special=False)
        for id, (token, kind) in enumerate(zip(keys["tokens"], keys["token_type"], strict=True))
        if kind == _USER_DEFINED and token
    ]
    return SentencePieceEncoder(
        proto,
        added,
        spaced=False,
        adds_bos=bool(keys.get("add_bos_token", True)),
        adds_eos=bool(keys.get("add_eos_token", False)),
        path=origin,
    )


def _field(number: int, value: bytes | float | int) -> bytes:
    """One field in protobuf's wire format: a text or message, a float32, or a whole number."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value % 2**64)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])

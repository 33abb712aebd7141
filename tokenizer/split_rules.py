"""How byte-level vocabularies split text, by name, where the files do not say it themselves.

A directory with `vocab.json` and `merges.txt` names a class, a gguf file a rule (`pre`). The
patterns are those of the models' own `tokenizer.json` files and of llama.cpp's table
(`llama-vocab.cpp`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEFAULT_PATTERNS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)

# The patterns that cut a text, each within the pieces of the one before.
SPLITS: Mapping[str, Sequence[str]] = {
    "llama-bpe": (LLAMA3_PATTERN,),
    "qwen2": (_QWEN2_PATTERN,),
    "smollm": (r"\p{N}", _GPT2_PATTERN),
    "gpt-2": (_GPT2_PATTERN,),
    "default": _DEFAULT_PATTERNS,
}
_COMPOSES = {"qwen2"}  # texts are normalised to NFC first


def byte_level_spec(
    rule: str, vocab: Mapping[str, int], merges: Sequence[Any], added: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns a `tokenizer.json` of byte-level BPE that splits text by one of `SPLITS`.

    vocab: ids by token, in GPT-2's spelling of bytes. merges: pairs, or texts of two tokens. added:
    entries of `added_tokens`. Nothing is put around a text.
    """
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in SPLITS[rule]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    byte_level["trim_offsets"] = False
    return {
        "version": "1.0",
        "added_tokens": list(added),
        "normalizer": {"type": "NFC"} if rule in _COMPOSES else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": rule == "llama-bpe",
            "vocab": dict(vocab),
            "merges": list(merges),
        },
    }

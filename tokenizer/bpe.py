"""Byte-level BPE, read from a `tokenizer.json` or from Meta's rank file, and run by tiktoken.

tiktoken joins the adjacent pair whose union has the lowest rank; a `tokenizer.json` lists merges
and the earliest wins. The two agree when an id is a rank: every single byte is a token, every
longer token is made by a merge, and the ids that the merges make never fall along the list. Each of
these is checked here, and a vocabulary that fails one is refused.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
LLAMA3_SPECIALS = 256

# tiktoken's regex engine keeps one state per character of such a run and dies near a million.
_LONGEST_SPACE_RUN = 500_000

_PROBE = "It's a Tést 1234567 -- \t\r\n\n  漢字かな, e\u0301 👩‍💻\x00\x7f\u200b\u00a0 end "


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the raw text before anything else is done to it."""

    id: int
    content: str
    special: bool

    @classmethod
    def from_entry(cls, id: int, entry: Mapping[str, Any], *, path: Path) -> AddedToken:
        """Returns the token that one entry of a Hugging Face file describes.

        Raises ValueError when it asks to be matched with the space or the word around it.
        """
        content = entry.get("content")
        if not isinstance(content, str) or not content:
            raise ValueError(f"{path}: the added token with id {id} has no content")
        for flag in ("lstrip", "rstrip", "single_word"):
            if entry.get(flag):
                raise ValueError(f"{path}: added token {content!r} has {flag}, not supported here")
        return cls(id=id, content=content, special=bool(entry.get("special")))


@dataclass(frozen=True)
class BytePairEncoder:
    """Turns ordinary text into ids. `pieces` gives the bytes of each id, added tokens left out."""

    pieces: Mapping[int, bytes]
    encoding: tiktoken.Encoding
    nfc: bool = False
    drops_leading_space: bool = False

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        """Returns the ids of `text`; they do not depend on where in a longer text it stands.

        Raises ValueError for a run of white space too long for the regex engine.
        """
        if len(text) > _LONGEST_SPACE_RUN and re.search(rf"\s{{{_LONGEST_SPACE_RUN}}}", text):
            raise ValueError(
                f"the text holds {_LONGEST_SPACE_RUN:,} or more white-space characters in a row; "
                "split it there"
            )
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return self.encoding.encode_ordinary(text)

    def encode_bare(self, text: str) -> list[int]:
        """Returns the ids of `text` as it stands inside a text: here the same as `encode`."""
        return self.encode(text)


def is_byte_level(spec: Mapping[str, Any]) -> bool:
    """Returns whether a `tokenizer.json` describes BPE over bytes."""
    model = spec.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else None)
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    return kind == "BPE" and any(step.get("type") == "ByteLevel" for step in steps)


def is_rank_file(head: bytes) -> bool:
    """Returns whether a file that begins with `head` has lines of a base64 token and a rank."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head) is not None


def read_added_tokens(spec: Mapping[str, Any], *, path: Path) -> list[AddedToken]:
    """Returns the added tokens of a `tokenizer.json`. Raises ValueError as `from_entry` does."""
    entries = spec.get("added_tokens") or []
    if not all(isinstance(entry.get("id"), int) for entry in entries):
        raise ValueError(f"{path}: an added token has no id")
    return [AddedToken.from_entry(entry["id"], entry, path=path) for entry in entries]


def read_byte_level(
    spec: Mapping[str, Any], *, added: Iterable[AddedToken], path: Path
) -> BytePairEncoder:
    """Returns the encoder of a byte-level `tokenizer.json`.

    Raises ValueError, naming what it met, where tiktoken could not give the same ids.
    """
    model = spec["model"]
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(field):
            raise ValueError(f"{path}: BPE with {field} {model[field]!r} is not supported")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError(f"{path}: its BPE model lacks a vocab or merges; fetch the file again")
    made = _merge_results(vocab, merges, path=path)
    outside = {token.content for token in added if vocab.get(token.content) == token.id}
    ranks = _ranks({text: id for text, id in vocab.items() if text not in outside}, made, path=path)
    pattern = _pattern(spec.get("pre_tokenizer"), path=path)
    encoding = _encoding(pattern, ranks, path=path)
    pieces = {id: token for token, id in ranks.items()}
    return BytePairEncoder(pieces, encoding, nfc=_is_nfc(spec.get("normalizer"), path=path))


def read_rank_file(path: Path) -> BytePairEncoder:
    """Returns the encoder of Meta's Llama 3 `tokenizer.model`.

    Raises ValueError for a broken line, or for another number of ranks: the file does not hold the
    pattern that splits text, and only Llama 3's is known.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}: line {number} is not a base64 token and its rank; fetch the file again"
            ) from None
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
        raise ValueError(
            f"{path}: has {len(ranks):,} ranks, not Llama 3's {LLAMA3_RANKS:,}; fetch the file "
            "again, or use the model's tokenizer.json"
        )
    pieces = {rank: token for token, rank in ranks.items()}
    return BytePairEncoder(pieces, _encoding(LLAMA3_PATTERN, ranks, path=path))


def llama3_specials() -> list[AddedToken]:
    """Returns the special tokens that Llama 3.1 and later put after the ranks of Meta's file."""
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    free = iter(range(LLAMA3_SPECIALS))
    names = [
        named[place] if place in named else f"reserved_special_token_{next(free)}"
        for place in range(LLAMA3_SPECIALS)
    ]
    return [AddedToken(LLAMA3_RANKS + i, f"<|{name}|>", True) for i, name in enumerate(names)]


def _steps(part: Any, list_name: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, which may be none, one, or a Sequence of them."""
    if part is None:
        return []
    return list(part.get(list_name) or []) if part.get("type") == "Sequence" else [part]


def _merge_results(vocab: Mapping[str, int], merges: list[Any], *, path: Path) -> set[str]:
    """What the merges make; they are checked to be in the order of the ids they make."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    made = ["".join(pair) for pair in pairs]
    try:
        ids = [vocab[token] for token in made]
    except KeyError as error:
        raise ValueError(f"{path}: a merge makes {error.args[0]!r}, not in the vocab") from None
    for place, (before, after) in enumerate(pairwise(ids), start=1):
        if after < before:
            raise ValueError(
                f"{path}: merge {place} makes id {after} after id {before}; merges out of the "
                "order of their ids are not supported"
            )
    return set(made)


def _ranks(vocab: Mapping[str, int], made: set[str], *, path: Path) -> dict[bytes, int]:
    """Rank by token, from the strings in which a `tokenizer.json` spells bytes."""
    table = _byte_of_character()
    ranks: dict[bytes, int] = {}
    for text, id in vocab.items():
        try:
            ranks[text.translate(table).encode("latin-1")] = id
        except UnicodeEncodeError:
            raise ValueError(f"{path}: token {text!r} does not spell bytes") from None
        if len(text) > 1 and text not in made:
            raise ValueError(f"{path}: no merge makes token {text!r}; not supported")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path}: no token for byte 0x{missing[0]:02X}; not supported")
    return ranks


def _byte_of_character() -> dict[int, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    # A character that spells no byte must not pass for the byte of its own code.
    table = {byte: 0xFFFD for byte in others}
    table.update({0x100 + place: byte for place, byte in enumerate(others)})
    return table


def _pattern(pre_tokenizer: Any, *, path: Path) -> str:
    """The regex that cuts text into the stretches inside which pairs are joined."""
    *before, byte_level = _steps(pre_tokenizer, "pretokenizers")
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space", True):
        raise ValueError(f"{path}: pre_tokenizer must end in ByteLevel without add_prefix_space")
    uses_gpt2 = byte_level.get("use_regex", True)
    if not before and uses_gpt2:
        return GPT2_PATTERN
    split = before[0] if before else {}
    pattern = (split.get("pattern") or {}).get("Regex")
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    if len(before) != 1 or split.get("type") != "Split" or not pattern or not isolated or uses_gpt2:
        kinds = [step.get("type") for step in before] + ["ByteLevel"]
        raise ValueError(
            f"{path}: pre_tokenizer {kinds} is not supported; one isolating regex Split "
            "and a ByteLevel without use_regex is"
        )
    return str(pattern)


def _is_nfc(normalizer: Any, *, path: Path) -> bool:
    kinds = [step.get("type") for step in _steps(normalizer, "normalizers")]
    other = [kind for kind in kinds if kind != "NFC"]
    if other:
        raise ValueError(f"{path}: normalizer {other[0]!r} is not supported")
    return bool(kinds)


def _encoding(pattern: str, ranks: dict[bytes, int], *, path: Path) -> tiktoken.Encoding:
    try:
        encoding = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
    except ValueError as error:
        raise ValueError(f"{path}: its split pattern does not compile: {error}") from None
    # tiktoken drops what the pattern does not match, where Hugging Face keeps it.
    if encoding.decode(encoding.encode_ordinary(_PROBE)) != _PROBE:
        raise ValueError(f"{path}: its split pattern leaves out some characters; not supported")
    return encoding

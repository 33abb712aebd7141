"""A `tokenizer.json`, run by the `tokenizers` library, with what it would do silently made loud.

The library drops characters that its vocabulary cannot spell, gives added tokens other ids than the
file's where those leave a gap, cuts and pads where the file says so, and draws merges at random
under dropout. The first two are errors here, the third is switched off, the last refused.
"""

from __future__ import annotations

import copy
import json
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from .added import AddedToken
from .encoding import (
    MOST_TOKENS,
    SPACE,
    Encoded,
    Span,
    check_count,
    check_text,
    library_errors,
)

_PROBE = "a b"
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MOST_RULES = 8_000_000  # characters of each of these; a normaliser may be a table of 500,000


class HuggingFaceEncoder:
    """The vocabulary and the rules of a `tokenizer.json`; see `Encoder`.

    spec: the contents of the file at `path`. configured: tokens that `tokenizer_config.json` adds.
    Raises ValueError, naming the file, for what the library cannot read or would not keep to.
    """

    def __init__(
        self, spec: Mapping[str, Any], configured: Sequence[AddedToken] = (), *, path: Path | str
    ) -> None:
        self._path = path
        self._spec = _adapted(spec, path)
        self._library = _load(self._spec, path)
        held = {token.content for token in self._library.get_added_tokens_decoder().values()}
        self._configured = [token for token in configured if token.content not in held]
        _add(self._library, self._configured)
        tokens = self._library.get_added_tokens_decoder()
        _check_ids(self._spec, configured, self._library, path)
        vocab = self._library.get_vocab(with_added_tokens=False)
        if len(set(vocab.values())) < len(vocab):
            raise ValueError(f"{path}: two tokens of its vocab have the same id")
        self._kinds = {step["type"] for step in _steps(self._spec)}
        self.pieces = {id: self._bytes(token) for token, id in vocab.items()}
        self.pieces |= {id: token.content.encode() for id, token in tokens.items()}
        self.added = {token.content: id for id, token in tokens.items()}
        self.special = {token.content: id for id, token in tokens.items() if token.special}
        self.before, self.after = self._surrounding()
        self.bos_id = self.before[0] if self.before else None
        self.eos_id = self.after[-1] if self.after else None
        with library_errors(f"{path}: its decoder fails"):
            decoder = self._library.decoder
            self.drops_leading_space = bool(decoder) and decoder.decode([f"{SPACE}a"]) == "a"
        self._alphabet = self._incomplete_alphabet(vocab)

    def encode(self, text: str, *, special: bool, inside: bool) -> Encoded:
        """Raises ValueError for a text that is too long, or that holds a character which the
        vocabulary cannot spell.
        """
        check_text(text)
        library = self._library_inside if inside else self._library
        with library_errors(f"{self._path} cannot encode the text"):
            library.encode_special_tokens = not special
            found = library.encode(text, add_special_tokens=False)
        encoded = Encoded(found.ids, self._spans(found, text))
        if self._alphabet is not None:
            self._check_spelt(encoded, text)
        return encoded

    def _spans(self, found: tokenizers.Encoding, text: str) -> list[Span]:
        """The library's spans; a space that was put in has none, a composed accent its letter's."""
        spans = list[Span]()
        following = [*(start for start, _ in found.offsets[1:]), len(text)]
        for id, (start, end), start_of_next in zip(found.ids, found.offsets, following):  # noqa: B905
            is_space = not self.pieces[id].strip(b" ")
            is_put_in = is_space and (start_of_next < end or not text[start:end].isspace())
            spans.append((start, start if is_put_in else end))
        return _whole(spans, text) if self._spec.get("normalizer") else spans

    @cached_property
    def _library_inside(self) -> tokenizers.Tokenizer:
        """The same without the space that only the start of a text is given."""
        if "Metaspace" not in self._kinds:
            return self._library
        spec = {k: v if k in _LARGE else copy.deepcopy(v) for k, v in self._spec.items()}
        for step in _steps(spec):
            if step["type"] == "Metaspace" and step.get("prepend_scheme") == "first":
                step["prepend_scheme"] = "never"
        library = _load(spec, self._path)
        _add(library, self._configured)
        return library

    def _bytes(self, token: str) -> bytes:
        if "ByteLevel" in self._kinds:
            spelt = token.translate(_BYTE_OF_CHARACTER)
            try:
                return spelt.encode("latin-1")
            except UnicodeEncodeError:
                return token.encode()  # a token that no text gives, as transformers shows it
        if "ByteFallback" in self._kinds and _is_byte(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode() if self._kinds & _SPACERS else token.encode()

    def _surrounding(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before a text, and after it."""
        with library_errors(f"{self._path}: its post_processor fails"):
            bare, full = (
                self._library.encode(_PROBE, add_special_tokens=add).ids for add in (False, True)
            )
        for n_before in range(len(full) - len(bare) + 1):
            if full[n_before : n_before + len(bare)] == bare:
                return full[:n_before], full[n_before + len(bare) :]
        raise ValueError(
            f"{self._path}: its post_processor does more than put tokens around a text"
        )

    def _incomplete_alphabet(self, vocab: Mapping[str, int]) -> frozenset[str] | None:
        """The characters that BPE begins with, where one that is absent would vanish."""
        model = self._spec["model"]
        if model.get("type", "BPE") != "BPE" or model.get("unk_token") is not None:
            return None
        if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
            return None
        before = model.get("continuing_subword_prefix") or ""
        after = model.get("end_of_word_suffix") or ""
        parts = (token.removeprefix(before).removesuffix(after) for token in vocab)
        alphabet = frozenset(part for part in parts if len(part) == 1)
        return None if alphabet >= _UTF8_ALPHABET and "ByteLevel" in self._kinds else alphabet

    def _check_spelt(self, encoded: Encoded, text: str) -> None:
        """Raise ValueError for a character of the text, added tokens aside, that was dropped."""
        assert self._alphabet is not None
        ordinary = list(text)
        for id, (start, end) in zip(encoded.ids, encoded.spans, strict=True):
            if id in self._added_ids:
                ordinary[start:end] = " " * (end - start)
        for character in sorted(set(self._normalized("".join(ordinary)))):
            missing = set(self._split(character)) - self._alphabet
            if missing and not character.isspace():
                raise ValueError(
                    f"{self._path}: its vocabulary has no token for {character!r} of the text, "
                    "which would be left out; remove it"
                )

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.added.values())

    def _normalized(self, text: str) -> str:
        normalizer = self._library.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def _split(self, text: str) -> str:
        """The text as the pre-tokenizer gives it to the model, its pieces joined."""
        splitter = self._library.pre_tokenizer
        return text if splitter is None else "".join(p for p, _ in splitter.pre_tokenize_str(text))


def _adapted(spec: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """A copy that neither cuts nor pads texts, and whose spans keep the spaces of their tokens."""
    if not isinstance(spec.get("model"), Mapping):
        raise ValueError(f"{path}: it has no model; fetch the file again")
    if spec["model"].get("dropout"):
        raise ValueError(
            f"{path}: BPE with dropout {spec['model']['dropout']!r} gives other ids at each call; "
            "set it to null"
        )
    _check_sizes(spec, path)
    if not all(isinstance(step.get("type"), str) for step in _steps(spec)):
        raise ValueError(f"{path} cannot be read: a step of it has no type; fetch the file again")
    adapted = {**spec, "padding": None, "truncation": None}
    with library_errors(f"{path} cannot be read"):  # nested too deep
        adapted["post_processor"] = copy.deepcopy(spec.get("post_processor"))
    for step in _steps({"post_processor": adapted["post_processor"]}):
        if "trim_offsets" in step:
            step["trim_offsets"] = False
    return adapted


def _check_sizes(spec: Mapping[str, Any], path: Path | str) -> None:
    """Raise ValueError naming the file for parts so large that the library would take gigabytes."""
    for name in ("vocab", "merges"):
        part = spec["model"].get(name)
        if isinstance(part, list | dict):
            check_count(len(part), MOST_TOKENS, f"entries of {name}", path)
    for name in _PARTS:
        with library_errors(f"{path} cannot be read"):  # nested too deep
            size = len(json.dumps(spec.get(name)))
        check_count(size, MOST_RULES, f"characters of {name}", path)


def _steps(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every step of the normaliser, the pre-tokenizer, the post-processor and the decoder."""
    lists = ("normalizers", "pretokenizers", "processors", "decoders")
    parts = [spec.get(name) for name in _PARTS]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            yield part
            for name in lists:
                inner = part.get(name)
                parts += inner if isinstance(inner, list) else []


def _load(spec: Mapping[str, Any], path: Path | str) -> tokenizers.Tokenizer:
    with library_errors(f"{path} cannot be read"):
        return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _add(library: tokenizers.Tokenizer, configured: Sequence[AddedToken]) -> None:
    """Add tokens in the order of their ids, which the library counts on by itself."""
    for token in sorted(configured, key=lambda token: token.id):
        flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
        flags |= {"special": token.special, "normalized": token.normalized}
        library.add_tokens([tokenizers.AddedToken(token.content, **flags)])


def _check_ids(
    spec: Mapping[str, Any],
    configured: Sequence[AddedToken],
    library: tokenizers.Tokenizer,
    path: Path | str,
) -> None:
    """Raise ValueError where an added token has another id than its file says."""
    given = {entry["content"]: entry["id"] for entry in spec.get("added_tokens") or []}
    for content, id in [*given.items(), *((token.content, token.id) for token in configured)]:
        actual = library.token_to_id(content)
        if actual != id:
            raise ValueError(
                f"{path}: added token {content!r} has id {id}, where the vocabulary gives it "
                f"{actual}; ids must follow one another without a gap"
            )


def _whole(offsets: Sequence[Span], text: str) -> list[Span]:
    """Spans with what a normaliser took along: the characters after them that no token spans, and
    the whole of a run of accents, which it may have reordered.
    """
    accents = [unicodedata.combining(character) > 0 for character in text]
    covered = bytearray(len(text) + 1)
    for start, end in offsets:
        covered[start:end] = b"\1" * (end - start)
    taken = _run_ends([not covered[at] and not text[at].isspace() for at in range(len(text))])
    ends = _run_ends(accents)
    starts, first = array("Q"), 0
    for at, is_accent in enumerate(accents):
        first = first if is_accent and at and accents[at - 1] else at
        starts.append(first)
    spans = []
    for start, end in offsets:
        if start < end < len(text):
            end = taken[end]
        if start < end < len(text) and accents[end - 1]:
            end = ends[end]
        if 0 < start < end:
            start = starts[start]
        spans.append((start, end))
    return spans


def _run_ends(holds: Sequence[bool]) -> array[int]:
    """For each index the first one from there on that does not hold; each is looked at once."""
    ends, end = array("Q", bytes(8 * len(holds))), len(holds)
    for at in reversed(range(len(holds))):
        end = end if holds[at] else at
        ends[at] = end
    return ends


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_of_character() -> dict[int, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    # A character that spells no byte must not pass for the byte of its own code.
    table = {byte: 0xFFFD for byte in others}
    table.update({0x100 + index: byte for index, byte in enumerate(others)})
    return table


_LARGE = {"model", "added_tokens"}
_SPACERS = {"Metaspace", "Replace"}
_BYTE_OF_CHARACTER = _byte_of_character()
_NOT_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_UTF8_ALPHABET = frozenset(
    chr(character)
    for character in range(0x200)
    if (byte := _BYTE_OF_CHARACTER.get(character, character)) < 0x100 and byte not in _NOT_IN_UTF8
)

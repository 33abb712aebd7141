"""Sentencepiece vocabularies: a `tokenizer.model` of Llama 2 and its kin, run by sentencepiece.

A model file says itself what becomes of white space, and a `tokenizer.json` beside it may say
otherwise; the latter is what the model's users run, so it wins. Sentencepiece reads its options
from the file alone: an option is changed by appending a few bytes, since of a protobuf field that
occurs twice the last one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

SPACE = "\u2581"

_NORMALIZER_SPEC = 3
_ADD_DUMMY_PREFIX = 3
_REMOVE_EXTRA_WHITESPACES = 4


@dataclass(frozen=True)
class SpaceRule:
    """Where a space is put before text, and whether spaces are kept as they are written.

    prefix: "always" (before each stretch between special tokens), "first" (only at the start of
    the text) or "never". doubles: text that begins with a space gets another. keeps: runs of spaces
    are kept; if not, they are left to the model file.
    """

    prefix: str = "always"
    doubles: bool = True
    keeps: bool = False


class SentencePieceEncoder:
    """Turns ordinary text into ids.

    `pieces` gives the bytes of each id; `control` the ids of the tokens that no text can give
    (<s>, </s>, <unk>), by name.
    """

    def __init__(self, proto: bytes, *, rule: SpaceRule, path: Path) -> None:
        kept = _option(_REMOVE_EXTRA_WHITESPACES, False) if rule.keeps else b""
        bare = _option(_ADD_DUMMY_PREFIX, False) + _option(_REMOVE_EXTRA_WHITESPACES, False)
        self._rule = rule
        self._bare = _load(proto + bare, path=path)
        self._full = self._bare if rule.prefix == "never" else _load(proto + kept, path=path)
        self.pieces, self.control = _read_pieces(self._full)
        self.bos_id = _known(self._full.bos_id())
        self.eos_id = _known(self._full.eos_id())
        self.drops_leading_space = self._full.normalize("a").startswith(SPACE)

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        """Returns the ids of `text`, which begins a text or, not `at_start`, follows a token."""
        prefixed = at_start or self._rule.prefix == "always"
        if text.startswith((" ", SPACE)) and not self._rule.doubles:
            prefixed = False
        return list((self._full if prefixed else self._bare).encode(text))

    def encode_bare(self, text: str) -> list[int]:
        """Returns the ids of `text` with every space of it and no other."""
        return list(self._bare.encode(text))


def read_sentencepiece(
    path: Path, *, spec: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> SentencePieceEncoder:
    """Returns the encoder of a sentencepiece file.

    `spec` is the `tokenizer.json` beside it and `settings` the `tokenizer_config.json`, which say
    how white space is treated. Raises ValueError when the file is broken.
    """
    return SentencePieceEncoder(path.read_bytes(), rule=_space_rule(spec, settings), path=path)


def _space_rule(spec: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> SpaceRule:
    if spec is None:
        return SpaceRule(prefix="first" if settings.get("legacy") is False else "always")
    steps = {step.get("type"): step for step in _all_steps(spec)}
    keeps = not steps.keys() & {"Strip", "Precompiled"}
    if "Prepend" in steps:
        return SpaceRule("always", keeps=keeps)
    metaspace = steps.get("Metaspace")
    if metaspace is None:
        return SpaceRule("never", keeps=keeps)
    fallback = "always" if metaspace.get("add_prefix_space", True) else "never"
    scheme = metaspace.get("prepend_scheme", fallback)
    return SpaceRule(scheme, doubles=not keeps, keeps=keeps)


def _all_steps(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The normalisers and pre-tokenizers of a `tokenizer.json`, in one flat list."""
    steps: list[Mapping[str, Any]] = []
    for name, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = spec.get(name) or {}
        steps += part.get(inner) or [part]
    return steps


def _option(field: int, value: bool) -> bytes:
    """Protobuf bytes that set one flag of the model's normaliser."""
    flag = bytes([field << 3, value])
    return bytes([_NORMALIZER_SPEC << 3 | 2, len(flag)]) + flag


def _load(proto: bytes, *, path: Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: not a sentencepiece model, or cut short ({reason}); fetch the file again"
        ) from None
    return processor


def _read_pieces(
    processor: sentencepiece.SentencePieceProcessor,
) -> tuple[dict[int, bytes], dict[str, int]]:
    pieces: dict[int, bytes] = {}
    control: dict[str, int] = {}
    for id in range(processor.get_piece_size()):
        text = processor.id_to_piece(id)
        if processor.is_byte(id):
            pieces[id] = bytes([int(text[3:5], 16)])
        elif processor.is_control(id) or processor.is_unknown(id):
            pieces[id] = text.encode()
            control[text] = id
        else:
            pieces[id] = text.replace(SPACE, " ").encode()
    return pieces, control


def _known(id: int) -> int | None:
    return id if id >= 0 else None

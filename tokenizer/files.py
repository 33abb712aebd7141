"""What the tokenizer files of a model directory hold, whichever of three kinds they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .bpe import (
    AddedToken,
    is_byte_level,
    is_rank_file,
    llama3_specials,
    read_added_tokens,
    read_byte_level,
    read_rank_file,
)
from .json_file import read_json
from .spm import read_sentencepiece


class Encoder(Protocol):
    """Ordinary text to ids; `pieces` gives the bytes of each id that ordinary text can have."""

    @property
    def pieces(self) -> Mapping[int, bytes]: ...
    @property
    def drops_leading_space(self) -> bool: ...
    def encode(self, text: str, *, at_start: bool) -> list[int]: ...
    def encode_bare(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Vocabulary:
    """What the files of a directory hold; the ids and the rule are what they say by themselves."""

    encoder: Encoder
    added: Sequence[AddedToken]
    control: Mapping[str, int] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool = False


def read_vocabulary(directory: Path, settings: Mapping[str, Any]) -> Vocabulary:
    """Returns the vocabulary of a directory whose `tokenizer_config.json` holds `settings`.

    Raises ValueError, naming the file and what to do, for files that are missing, broken or not
    supported.
    """
    json_file, model_file = directory / "tokenizer.json", directory / "tokenizer.model"
    spec = read_json(json_file) if json_file.is_file() else None
    if spec is not None and is_byte_level(spec):
        return _from_json(spec, settings, json_file)
    if model_file.is_file():
        with model_file.open("rb") as file:
            head = file.read(4096)
        if is_rank_file(head):
            return _from_rank_file(model_file, settings)
        return _from_sentencepiece(model_file, settings, spec)
    if spec is not None:
        kind = (spec.get("model") or {}).get("type")
        raise ValueError(
            f"{json_file}: not byte-level BPE (model type {kind!r}); put the sentencepiece "
            "tokenizer.model beside it"
        )
    raise ValueError(
        f"{directory}: no tokenizer.json and no tokenizer.model; fetch one of them from the model"
    )


def _from_json(spec: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> Vocabulary:
    added = _with_configured(read_added_tokens(spec, path=path), settings, path)
    encoder = read_byte_level(spec, added=added, path=path)
    bos_id = _template_bos(spec, added, settings, path)
    return Vocabulary(encoder, added, bos_id=bos_id, adds_bos=bos_id is not None)


def _from_rank_file(path: Path, settings: Mapping[str, Any]) -> Vocabulary:
    encoder = read_rank_file(path)
    configured = _with_configured([], settings, path)
    taken = {token.id for token in configured}
    added = configured + [token for token in llama3_specials() if token.id not in taken]
    first = len(encoder.pieces)
    return Vocabulary(encoder, added, bos_id=first, eos_id=first + 1, adds_bos=True)


def _from_sentencepiece(
    path: Path, settings: Mapping[str, Any], spec: Mapping[str, Any] | None
) -> Vocabulary:
    encoder = read_sentencepiece(path, spec=spec, settings=settings)
    in_spec = [] if spec is None else read_added_tokens(spec, path=path.with_suffix(".json"))
    added = _with_configured(in_spec, settings, path)
    return Vocabulary(
        encoder,
        [token for token in added if encoder.control.get(token.content) != token.id],
        control=encoder.control,
        bos_id=encoder.bos_id,
        eos_id=encoder.eos_id,
        adds_bos=encoder.bos_id is not None,
    )


def _with_configured(
    tokens: list[AddedToken], settings: Mapping[str, Any], path: Path
) -> list[AddedToken]:
    """`tokens` and those that only `tokenizer_config.json` adds to the vocabulary."""
    known = {token.id for token in tokens}
    listed = settings.get("added_tokens_decoder") or {}
    config = path.with_name("tokenizer_config.json")
    return tokens + [
        AddedToken.from_entry(int(id), entry, path=config)
        for id, entry in listed.items()
        if int(id) not in known
    ]


def _template_bos(
    spec: Mapping[str, Any], added: Sequence[AddedToken], settings: Mapping[str, Any], path: Path
) -> int | None:
    """The id that the post-processor puts before a text, if it does."""
    part = spec.get("post_processor") or {}
    steps = part.get("processors") or [part]
    starts = [
        s["single"][0] for s in steps if s.get("type") == "TemplateProcessing" and s["single"]
    ]
    name = (starts[0].get("SpecialToken") or {}).get("id") if starts else None
    if name is None:
        return None
    bos = token_name(settings.get("bos_token", name))
    ids = {token.content: token.id for token in added}
    if name != bos or name not in ids:
        raise ValueError(f"{path}: texts begin with {name!r} there, but the bos_token is {bos!r}")
    return ids[name]


def token_name(value: Any) -> str | None:
    """Returns the text of a token that a file names by a string or by a mapping."""
    return value.get("content") if isinstance(value, Mapping) else value

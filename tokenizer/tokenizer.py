"""The tokenizer of a model directory: text to ids and back, and conversations to ids.

Added tokens (`<|eot_id|>`, `<think>`...) are found in the raw text first, the leftmost and then the
longest one; the stretches between them go to the vocabulary's own encoder. Text of a sentencepiece
model cannot spell its <s> and </s>, except in a rendered chat template, which writes them so.
"""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bpe import AddedToken
from .chat import ChatTemplate, find_chat_template
from .files import Vocabulary, read_vocabulary, token_name
from .json_file import read_json

_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer:
    """Text to ids and back, as the model's own tokenizer does it; see `from_directory`.

    `n_vocab`: the ids are 0 to `n_vocab - 1`; a model's vocabulary may be padded beyond.
    `bos_id`, `eos_id`: None where the model has none. `special_ids`: ids that stand for no text.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, settings: Mapping[str, Any], directory: Path
    ) -> None:
        self._encoder = vocabulary.encoder
        self._added = _ids_by_text(vocabulary.added, directory=directory)
        self._markers = {**vocabulary.control, **self._added}
        self._added_pattern = _any_of(self._added)
        self._marker_pattern = _any_of(self._markers)
        self._pieces = _all_pieces(vocabulary, directory=directory)
        self.n_vocab = len(self._pieces)
        special = {token.id for token in vocabulary.added if token.special}
        self.special_ids = frozenset(special | set(vocabulary.control.values()))
        self.bos_id = self._named_id(settings, "bos_token", vocabulary.bos_id, directory)
        self.eos_id = self._named_id(settings, "eos_token", vocabulary.eos_id, directory)
        rule = settings.get("add_bos_token")
        self._adds_bos = vocabulary.adds_bos if rule is None else bool(rule)
        if self._adds_bos and self.bos_id is None:
            raise ValueError(f"{directory}: texts are to begin with a BOS, but it has no bos_token")
        self._template = self._chat_template(settings, directory)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Returns the tokenizer of a model directory in Hugging Face layout.

        It is read from a byte-level `tokenizer.json`, or else from the `tokenizer.model`, which is
        Meta's rank file or a sentencepiece model. Raises ValueError, naming the file and what to
        do, when neither is there, when one is broken, and for a kind that is not supported.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory; give the one with the tokenizer")
        settings = {
            **_settings(directory / "special_tokens_map.json"),
            **_settings(directory / "tokenizer_config.json"),
        }
        vocabulary = read_vocabulary(directory, settings)
        return cls(vocabulary, settings=settings, directory=directory)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be called."""
        return self._template is not None

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Returns the ids of `text`, begun by the BOS if `bos`, or if None by the model's own rule.

        Raises ValueError when a BOS is asked for and the model has none.
        """
        ids = self._split_and_encode(text, self._added_pattern, self._added)
        if not (self._adds_bos if bos is None else bos):
            return ids
        if self.bos_id is None:
            raise ValueError("this tokenizer has no BOS token; encode with bos=False")
        return [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD.

        The space that a sentencepiece model puts before a text is taken off again. Raises
        ValueError for an id that the tokenizer does not know.
        """
        skipped = self.special_ids if skip_special else frozenset[int]()
        places = map(operator.index, ids)
        pieces = [self.token_bytes(id) for id in places if id not in skipped]
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._encoder.drops_leading_space else text

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """Returns a decoder that is fed one id at a time and continues a text: no space is lost."""
        return StreamDecoder(self, skip_special=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """Returns the bytes of a token; of a special one, its name in UTF-8.

        Raises ValueError for an id that the tokenizer does not know.
        """
        piece = self._piece(id)
        if piece is None:
            raise ValueError(f"token id {id} is unknown: this tokenizer has {self.n_vocab:,} ids")
        return piece

    def token_text(self, id: int) -> str:
        """Returns one token for display: half characters as U+FFFD, an unknown id as `<id>`."""
        piece = self._piece(id)
        return (
            f"<{operator.index(id)}>" if piece is None else piece.decode("utf-8", errors="replace")
        )

    def single_token(self, text: str) -> int:
        """Returns the id of the one token that `text` is, alone or else after a space.

        The name of an added or special token gives that token. Raises ValueError, naming the
        pieces, when `text` is more than one token.
        """
        if text in self._markers:
            return self._markers[text]
        pieces = self.encode(text, bos=False)
        readings = [pieces, self._encoder.encode_bare(text)]
        if text and not text.startswith(" "):
            readings.insert(1, self.encode(" " + text, bos=False))
        for ids in readings:
            if len(ids) == 1:
                return ids[0]
        shown = [self.token_text(id) for id in pieces]
        raise ValueError(f"{text!r} is not one token but {len(pieces)}: {shown}")

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the ids of a conversation, laid out by the model's chat template.

        Each message has a "role" and a "content". No BOS is added to what the template writes.
        Raises ValueError when the model has no template, and for an error of the template.
        """
        if self._template is None:
            raise ValueError("this model has no chat template; encode plain text instead")
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        return self._split_and_encode(text, self._marker_pattern, self._markers)

    def _split_and_encode(
        self, text: str, pattern: re.Pattern[str], tokens: Mapping[str, int]
    ) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(pattern.split(text)):
            if place % 2:
                ids.append(tokens[part])
            elif part:
                ids += self._encoder.encode(part, at_start=place == 0)
        return ids

    def _piece(self, id: int) -> bytes | None:
        place = operator.index(id)
        return self._pieces[place] if 0 <= place < self.n_vocab else None

    def _named_id(
        self, settings: Mapping[str, Any], name: str, otherwise: int | None, directory: Path
    ) -> int | None:
        if name not in settings:
            return otherwise
        text = token_name(settings[name])
        if text is not None and text not in self._markers:
            raise ValueError(f"{directory}: its {name} {text!r} is not among its special tokens")
        return None if text is None else self._markers[text]

    def _chat_template(self, settings: Mapping[str, Any], directory: Path) -> ChatTemplate | None:
        source = find_chat_template(directory, settings)
        if source is None:
            return None
        names = {f"{name}_token": token_name(settings.get(f"{name}_token")) for name in _NAMES}
        for name, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            names[name] = None if id is None else self.token_text(id)
        given = {name: text for name, text in names.items() if text is not None}
        return ChatTemplate(source, special_tokens=given, origin=str(directory))


class StreamDecoder:
    """Decodes ids one by one; a character is given out when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Returns the text that `id` completes, maybe empty.

        An id beyond the tokenizer's, which a model with a padded vocabulary may choose, is shown
        as `<id>`.
        """
        if operator.index(id) in self._skipped:
            return ""
        if not 0 <= operator.index(id) < self._tokenizer.n_vocab:
            return self.flush() + self._tokenizer.token_text(id)
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """Returns what is left at the end: U+FFFD for a character cut short, or nothing."""
        return self._decoder.decode(b"", final=True)


def _settings(path: Path) -> dict[str, Any]:
    """Contents of a file that need not be there."""
    return read_json(path) if path.is_file() else {}


def _ids_by_text(tokens: Sequence[AddedToken], *, directory: Path) -> dict[str, int]:
    ids: dict[str, int] = {}
    for token in tokens:
        if ids.setdefault(token.content, token.id) != token.id:
            raise ValueError(f"{directory}: added token {token.content!r} has two ids")
    return ids


def _all_pieces(vocabulary: Vocabulary, *, directory: Path) -> list[bytes | None]:
    """The bytes of every id; None for ids that are skipped."""
    known = dict(vocabulary.encoder.pieces)
    for token in vocabulary.added:
        text = token.content.encode()
        if known.setdefault(token.id, text) != text:
            raise ValueError(f"{directory}: added token {token.content!r} has the id of another")
    return [known.get(id) for id in range(max(known) + 1)]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that splits at the leftmost and longest of the tokens."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

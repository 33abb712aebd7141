"""The tokenizer of a model directory: text to ids and back, and conversations to ids.

Names of special tokens in a text (`<|eot_id|>`, `<s>`...) are read as those tokens, as transformers
reads them, whatever kind of file the vocabulary is; with `special=False` they are plain text.
"""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .chat import ChatTemplate, Shield, find_chat_template
from .encoding import Encoded, Encoder
from .files import read_encoder, read_settings, token_name
from .visible import decoded

_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer:
    """Text to ids and back, as the model's own tokenizer does it; see `from_directory`.

    `n_vocab`: the ids are 0 to `n_vocab - 1`; a model's vocabulary may be padded beyond.
    `bos_id`, `eos_id`: None where the model has none. `special_ids`: ids that stand for no text.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        settings: Mapping[str, Any],
        origin: str,
        chat_template: str | None = None,
    ) -> None:
        self._encoder = encoder
        self._pieces = encoder.pieces
        self.n_vocab = max(self._pieces) + 1
        self.special_ids = frozenset(encoder.special.values())
        self.bos_id = self._named_id(settings, "bos_token", encoder.bos_id, origin)
        self.eos_id = self._named_id(settings, "eos_token", encoder.eos_id, origin)
        self._template: ChatTemplate | None = None
        if chat_template is not None:
            names = self._special_names(settings)
            self._template = ChatTemplate(chat_template, special_tokens=names, origin=origin)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Returns the tokenizer of a model directory in Hugging Face layout.

        It is read from a `tokenizer.json`, or else from the `tokenizer.model`, which is Meta's rank
        file or a sentencepiece model, or else from `vocab.json` and `merges.txt`. Raises
        ValueError, naming the file and what to do, when none is there or one is broken.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory; give the one with the tokenizer")
        settings = read_settings(directory)
        return cls(
            read_encoder(directory, settings),
            settings=settings,
            origin=str(directory),
            chat_template=find_chat_template(directory, settings),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be called."""
        return self._template is not None

    @property
    def template_variables(self) -> frozenset[str]:
        """The names that the chat template reads, of `chat`'s variables and others."""
        return self._chat_template.variables

    def encode(self, text: str, *, bos: bool | None = None, special: bool = True) -> list[int]:
        """Returns the ids of `text`; see `encode_with_spans`."""
        return self.encode_with_spans(text, bos=bos, special=special).ids

    def encode_with_spans(
        self, text: str, *, bos: bool | None = None, special: bool = True
    ) -> Encoded:
        """Returns the ids of `text` and, for each, its first character and the one after its last.

        bos: by default the ids are begun and ended by what the model's own rule puts around a text;
        True puts the BOS first where that rule does not, False puts nothing around it.
        special: whether the name of a special token in the text is that token; False is for a
        stranger's text. A token of a part of a character spans the whole character; one that
        stands for no text, such as the BOS, spans none: (0, 0).

        Raises ValueError when a BOS is asked for and the model has none, and for a text that is too
        long or holds characters that the vocabulary cannot spell.
        """
        encoded = self._encoder.encode(text, special=special, inside=False)
        before, after = self._around(bos)
        ids = [*before, *encoded.ids, *after]
        spans = [(0, 0)] * len(before) + list(encoded.spans) + [(0, 0)] * len(after)
        return Encoded(ids, spans)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD.

        The space that a sentencepiece model puts before a text is taken off again. Raises
        ValueError for an id that the tokenizer does not know.
        """
        skipped = self.special_ids if skip_special else frozenset[int]()
        indices = map(operator.index, ids)
        pieces = [self.token_bytes(id) for id in indices if id not in skipped]
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._encoder.drops_leading_space else text

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """Returns a decoder that is fed one id at a time and continues a text: no space is lost."""
        return StreamDecoder(self, skip_special=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """Returns the bytes of a token; of a special one, its name in UTF-8.

        Raises ValueError for an id that the tokenizer does not know.
        """
        piece = self._pieces.get(operator.index(id))
        if piece is None:
            raise ValueError(f"token id {id} is unknown: this tokenizer has {self.n_vocab:,} ids")
        return piece

    def token_text(self, id: int) -> str:
        """Returns one token for display: half a character as `<D7>`, an unknown id as `<id>`."""
        index = operator.index(id)
        piece = self._pieces.get(index)
        return f"<{index}>" if piece is None else decoded(piece)

    def single_token(self, text: str) -> int:
        """Returns the id of the one token that `text` is, alone or else after a space.

        The name of an added or special token gives that token. Raises ValueError, naming the
        pieces, when `text` is more than one token.
        """
        if text in self._encoder.added:
            return self._encoder.added[text]
        texts = [text] if not text or text.startswith(" ") else [text, " " + text]
        readings = [self._encoder.encode(spelt, special=True, inside=False) for spelt in texts]
        for ids, spans in [*readings, self._encoder.encode(text, special=True, inside=True)]:
            held = [id for id, (start, end) in zip(ids, spans, strict=True) if start < end]
            if len(held) == 1:
                return held[0]
        shown = [self.token_text(id) for id in readings[0].ids]
        raise ValueError(f"{text!r} is not one token but {len(shown)}: {shown}")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        special: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Returns the ids of a conversation, laid out by the model's chat template.

        Each message has a "role" and a "content". Nothing is put around what the template writes.
        special: whether names of special tokens in the messages are those tokens; by default they
        are plain text, so that no message can end itself or speak for another role. variables: what
        else the template reads: `tools`, `documents`, `enable_thinking`, `date_string`...

        Raises ValueError when the model has no template, and for an error of the template.
        """
        template = self._chat_template
        shield = Shield(() if special else self._encoder.special)
        text = template.render(
            shield.cover(messages), add_generation_prompt=add_generation_prompt, **variables
        )
        return self._encode_covered(text, shield)

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise ValueError("this model has no chat template; encode plain text instead")
        return self._template

    def _encode_covered(self, text: str, shield: Shield) -> list[int]:
        """The ids of a template's text, in which what `shield` covers is plain."""
        encoded = self._encoder.encode(text, special=True, inside=False)
        if not shield.is_used:
            return encoded.ids
        added = frozenset(self._encoder.added.values())
        ids, done = list[int](), 0

        def add_stretch(end: int) -> None:
            stretch = shield.uncover(text[done:end])
            ids.extend(self._encoder.encode(stretch, special=False, inside=done > 0).ids)

        for id, (start, end) in zip(encoded.ids, encoded.spans, strict=True):
            if id in added:
                add_stretch(start)
                ids.append(id)
                done = end
        add_stretch(len(text))
        return ids

    def _around(self, bos: bool | None) -> tuple[list[int], list[int]]:
        """The ids before and after a text."""
        before, after = self._encoder.before, self._encoder.after
        if bos is None or (bos and self.bos_id in before):
            return before, after
        if not bos:
            return [], []
        if self.bos_id is None:
            raise ValueError("this tokenizer has no BOS token; encode with bos=False")
        return [self.bos_id, *before], after

    def _named_id(
        self, settings: Mapping[str, Any], name: str, otherwise: int | None, origin: str
    ) -> int | None:
        if name not in settings:
            return otherwise
        text = token_name(settings[name])
        if text is None and settings[name] not in (None, ""):
            raise ValueError(f"{origin}: its {name} is {ascii(settings[name])[:80]}, not a token")
        if text is not None and text not in self._encoder.added:
            raise ValueError(f"{origin}: its {name} {text!r} is not among its special tokens")
        return None if text is None else self._encoder.added[text]

    def _special_names(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """The texts of special tokens as a chat template names them, those without one left out."""
        names = {f"{name}_token": token_name(settings.get(f"{name}_token")) for name in _NAMES}
        for name, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            names[name] = None if id is None else self.token_text(id)
        return {name: text for name, text in names.items() if text is not None}


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
        if operator.index(id) not in self._tokenizer._pieces:
            return self.flush() + self._tokenizer.token_text(id)
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """Returns what is left at the end: U+FFFD for a character cut short, or nothing."""
        return self._decoder.decode(b"", final=True)

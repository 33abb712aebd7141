"""Sentencepiece vocabularies: a `tokenizer.model` of Llama 2 and its kin, run by sentencepiece.

Sentencepiece reads its options from the model file alone: an option is changed by appending a few
bytes, since of a protobuf field that occurs twice the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from .added import AddedToken, AddedTokens
from .encoding import SPACE, Encoded, Span, check_text, library_errors

_NORMALIZER_SPEC = 3
_ADD_DUMMY_PREFIX = 3
_REMOVE_EXTRA_WHITESPACES = 4


class SentencePieceEncoder:
    """A vocabulary of sentencepiece and the tokens added to it; see `Encoder`.

    spaced: whether every stretch between added tokens begins with the space that the model file
    puts before a text, as transformers did up to 4.33 and does under "legacy". Else only the text's
    start has it.
    """

    def __init__(
        self,
        proto: bytes,
        configured: Sequence[AddedToken],
        *,
        spaced: bool,
        adds_bos: bool,
        adds_eos: bool,
        path: Path | str,
    ) -> None:
        bare = _option(_ADD_DUMMY_PREFIX, False) + _option(_REMOVE_EXTRA_WHITESPACES, False)
        self._bare = _load(proto + bare, path=path)
        self._full = _load(proto, path=path)
        self._spaced = spaced
        self.pieces, control = _read_pieces(self._full)
        added = {**control, **{token.content: token for token in configured}}
        for token in added.values():
            if self.pieces.setdefault(token.id, token.content.encode()) != token.content.encode():
                raise ValueError(
                    f"{path}: added token {token.content!r} has the id {token.id} of another"
                )
        self._added = AddedTokens(added.values(), path=path)
        self.added = self._added.ids
        self.special = {text: token.id for text, token in added.items() if token.special}
        self.bos_id = _known(self._full.bos_id())
        self.eos_id = _known(self._full.eos_id())
        self.before = [self.bos_id] if adds_bos and self.bos_id is not None else []
        self.after = [self.eos_id] if adds_eos and self.eos_id is not None else []
        self.drops_leading_space = self._full.normalize("a").startswith(SPACE)

    def encode(self, text: str, *, special: bool, inside: bool) -> Encoded:
        """Raises ValueError for a text that is too long."""
        check_text(text)

        def encode_stretch(start: int, end: int) -> Encoded:
            begins = start == 0 and not inside
            processor = self._full if begins or self._spaced else self._bare
            with library_errors("the text cannot be encoded"):
                found = processor.encode(text[start:end], return_type="offset_mapping")
            return Encoded(found["ids"], self._characters(found["ids"], found["offsets"], start))

        return self._added.encode(text, special=special, encode_stretch=encode_stretch)

    def _characters(self, ids: Sequence[int], offsets: list[Span], start: int) -> list[Span]:
        """Spans from `start` on. Of a character in bytes, sentencepiece gives the last one all."""
        spans, end_of_next = list[Span](), 0
        for id in reversed(ids):
            first, end = offsets.pop()  # the list is given up, which of a long text takes much
            if first == end and self._full.is_byte(id):
                end = end_of_next
            spans.append((start + first, start + end))
            end_of_next = end
        spans.reverse()
        return spans


def _option(field: int, value: bool) -> bytes:
    """Protobuf bytes that set one flag of the model's normaliser."""
    flag = bytes([field << 3, value])
    return bytes([_NORMALIZER_SPEC << 3 | 2, len(flag)]) + flag


def _load(proto: bytes, *, path: Path | str) -> sentencepiece.SentencePieceProcessor:
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
) -> tuple[dict[int, bytes], dict[str, AddedToken]]:
    """The bytes of every id, and the tokens that no ordinary text can give (<s>, </s>, <unk>)."""
    pieces: dict[int, bytes] = {}
    control: dict[str, AddedToken] = {}
    for id in range(processor.get_piece_size()):
        text = processor.id_to_piece(id)
        if processor.is_byte(id):
            pieces[id] = bytes([int(text[3:5], 16)])
        elif processor.is_control(id) or processor.is_unknown(id):
            pieces[id] = text.encode()
            control[text] = AddedToken(id, text, special=True)
        else:
            pieces[id] = text.replace(SPACE, " ").encode()
    return pieces, control


def _known(id: int) -> int | None:
    return id if id >= 0 else None

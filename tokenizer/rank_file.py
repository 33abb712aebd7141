"""Meta's `tokenizer.model` of Llama 3: lines of a base64 token and its rank, run by tiktoken."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from .added import AddedToken, AddedTokens
from .encoding import Encoded, Span, check_text, library_errors
from .split_rules import LLAMA3_PATTERN

N_RANKS = 128_000
N_SPECIALS = 256
# By their place after the ranks; the others are reserved.
_NAMES = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
# tiktoken's regex engine keeps one state per character of such a run and dies near a million.
_LONGEST_SPACE_RUN = 500_000


class RankFileEncoder:
    """Byte-level BPE by ranks, with Llama 3's splitting and special tokens; see `Encoder`."""

    drops_leading_space = False

    def __init__(self, content: bytes, configured: Sequence[AddedToken], *, path: Path) -> None:
        ranks = _read_ranks(content, path)
        taken = {token.id for token in configured}
        added = [*configured, *(token for token in _specials() if token.id not in taken)]
        self._added = AddedTokens(added, path=path)
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self.pieces = {rank: token for token, rank in ranks.items()}
        self.pieces |= {token.id: token.content.encode() for token in added}
        self.added = self._added.ids
        self.special = {token.content: token.id for token in added if token.special}
        self.bos_id, self.eos_id = N_RANKS, N_RANKS + 1
        self.before, self.after = [self.bos_id], list[int]()

    def encode(self, text: str, *, special: bool, inside: bool) -> Encoded:
        """Raises ValueError for a text, or a run of white space in it, too long for tiktoken."""
        check_text(text)
        if len(text) > _LONGEST_SPACE_RUN and re.search(rf"\s{{{_LONGEST_SPACE_RUN}}}", text):
            raise ValueError(
                f"the text holds {_LONGEST_SPACE_RUN:,} or more white-space characters in a row; "
                "split it there"
            )

        def encode_stretch(start: int, end: int) -> Encoded:
            with library_errors("the text cannot be encoded"):
                ids = self._encoding.encode_ordinary(text[start:end])
            return Encoded(ids, _byte_spans([self.pieces[id] for id in ids], text, start, end))

        return self._added.encode(text, special=special, encode_stretch=encode_stretch)


def is_rank_file(content: bytes) -> bool:
    """Returns whether a file has lines of a base64 token and a rank, judging by the first."""
    return re.match(rb"[A-Za-z0-9+/]{1,4096}={0,2} \d{1,9}\r?\n", content) is not None


def _read_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Raises ValueError for a broken line, or for another number of ranks: the file does not hold
    the pattern that splits text, and only Llama 3's is known.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}: line {number} is not a base64 token and its rank; fetch the file again"
            ) from None
    if sorted(ranks.values()) != list(range(N_RANKS)):
        raise ValueError(
            f"{path}: has {len(ranks):,} ranks, not Llama 3's {N_RANKS:,}; fetch the file "
            "again, or use the model's tokenizer.json"
        )
    return ranks


def _specials() -> list[AddedToken]:
    """The special tokens that Llama 3.1 and later put after the ranks."""
    free = itertools.count()
    names = [_NAMES.get(n) or f"reserved_special_token_{next(free)}" for n in range(N_SPECIALS)]
    return [AddedToken(N_RANKS + n, f"<|{name}|>", True) for n, name in enumerate(names)]


def _byte_spans(pieces: Sequence[bytes], text: str, start: int, end: int) -> list[Span]:
    """The characters that pieces stand for, which spell text[start:end] byte by byte.

    A piece of a part of a character spans the whole character.
    """
    character = [at for at in range(start, end) for _ in text[at].encode("utf-8")]
    ends = list(itertools.accumulate(len(piece) for piece in pieces))
    starts = [0, *ends[:-1]]
    return [(character[a], character[b - 1] + 1) for a, b in zip(starts, ends, strict=True)]

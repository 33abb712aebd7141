"""What the verbs of `shardlens steer` share: pairs from a file, as text the model can read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .engine.lens_spec import LensSpec
from .engine.steering import DEFAULT_POINT
from .engine.vectors import METHODS, SteeringVectors
from .interp.extract import AT, extract
from .interp.pairs import Pair
from .interp.prompts import PairIds, PromptForm, encode_pairs
from .model.config import ModelConfig
from .model.points import POINTS, Layers
from .session import NeedsFn, Session, progress
from .tokenizer.tokenizer import Tokenizer

# how pairs become tokens
PairForm = Callable[[Tokenizer, Sequence[Pair]], list[PairIds]]


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL or JSON: question and two answers, or positive and negative texts",
    )
    parser.add_argument("--chat", action="store_true", help="questions are a user's chat messages")
    parser.add_argument(
        "--answer-prefix",
        default=PromptForm().answer_prefix,
        metavar="TEXT",
        help="what leads from question to answer outside a chat (default: a line 'Answer:')",
    )


def add_extraction_arguments(parser: argparse.ArgumentParser) -> None:
    add_place_arguments(parser)
    parser.add_argument("--method", choices=METHODS, default="mean_diff")
    parser.add_argument(
        "--at", choices=AT, help="which state stands for an answer (default: the label's)"
    )
    parser.add_argument(
        "--contrast",
        nargs=2,
        metavar=("TEXT", "TEXT"),
        help="instead of answers compare questions after two texts, the matching one first",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", default="all", help="all, or e.g. 0-3,8,-1 (default: all)")
    parser.add_argument("--point", help=f"of {', '.join(POINTS)}")


def form_of(arguments: argparse.Namespace) -> PromptForm:
    # a shell has no easy way to write a line break
    prefix = arguments.answer_prefix.replace("\\n", "\n")
    return PromptForm(chat=arguments.chat, answer_prefix=prefix)


def extracted(
    session: Session, pairs: Sequence[Pair], arguments: argparse.Namespace, layers: Layers
) -> SteeringVectors:
    """Vectors from all of the pairs, as the arguments of `add_extraction_arguments` say."""
    with progress("extracting", shown=session.prints) as on_progress:
        return extract(
            session.model,
            session.tokenizer,
            pairs,
            point=points_of(arguments),
            layers=layers,
            method=arguments.method,
            at=arguments.at or "label",
            contrast=contrast_of(arguments),
            form=form_of(arguments),
            on_progress=on_progress,
        )


def points_of(arguments: argparse.Namespace) -> list[str]:
    return (arguments.point or DEFAULT_POINT).split(",")


def contrast_of(arguments: argparse.Namespace) -> tuple[str, str] | None:
    if arguments.contrast is None:
        return None
    if arguments.at is not None:
        raise ValueError("--at is of answers, which --contrast does not compare: give one of them")
    first, second = arguments.contrast
    return first, second


def pair_needs(pairs: Sequence[Pair], *forms: PairForm) -> NeedsFn:
    """Room for the longest text of the pairs; refuses what cannot be laid out in all the forms."""

    def needs(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, int, LensSpec | None]:
        encoded = [pair for form in forms for pair in form(tokenizer, pairs)]
        longest = max(len(side.ids) for pair in encoded for side in (pair.matching, pair.other))
        return longest, longest, None

    return needs


def for_extraction(arguments: argparse.Namespace) -> PairForm:
    form, contrast = form_of(arguments), contrast_of(arguments)
    needs_label = arguments.at in (None, "label")
    return partial(_encode, form=form, needs_label=needs_label, contrast=contrast)


def for_measuring(arguments: argparse.Namespace) -> PairForm:
    return partial(_encode, form=form_of(arguments), needs_label=True, contrast=None)


def _encode(tokenizer: Tokenizer, pairs: Sequence[Pair], **how: Any) -> list[PairIds]:
    return encode_pairs(tokenizer, pairs, **how)

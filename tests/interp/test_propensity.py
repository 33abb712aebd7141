"""Propensities of many edits from one pass, against a pass for each: our own, and transformers'."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import hf_model, save
from steered import edits_of, hook_for, load
from tolerances import CHUNKING, EFFECT, LENS
from torch import Tensor

from shardlens.engine import Steering
from shardlens.interp import (
    MULTIPLIERS,
    PROTOCOLS,
    Item,
    Pair,
    PairIds,
    PromptForm,
    Side,
    Variants,
    encode_pair,
    propensities,
    propensity,
)
from shardlens.model import DEMO, POINTS, Tap, Transformer
from shardlens.parallel import TensorParallel
from shardlens.tokenizer import Tokenizer

# The weights of `oracles` are so large that two float32 passes differ by more than the 1e-5 nats
# that propensities are held to: logits of order 1 keep rounding far below.
SMALL_LOGITS = dict(initializer_range=0.08)
FAMILIES = ("llama-biases", "qwen3-tied")
N_LAYERS, D = 3, 48
TAPS = [Tap(layer, point) for layer in range(N_LAYERS) for point in POINTS]
N_STEPS = len(MULTIPLIERS)


def of_ids(prompt: list[int], answers: tuple[list[int], list[int]], label: int) -> PairIds:
    """Answers that are alike up to `label`, which counts from their start."""
    label_at = len(prompt) + label
    sides = [Side([*prompt, *answer], len(prompt), label_at) for answer in answers]
    return PairIds(sides[0], sides[1], n_shared=label_at, key="", form="", is_first=None)


PROMPT = torch.randint(3, 509, (10,), generator=torch.Generator().manual_seed(5)).tolist()
# The longer answer is the matching one or the other.
PAIRS = {
    "bracketed": of_ids(PROMPT, ([21, 30, 22], [21, 31, 22, 40, 41]), label=1),
    "a sentence": of_ids(PROMPT, ([7, 8, 9, 30, 22, 5], [7, 8, 9, 31]), label=3),
    "bare": of_ids(PROMPT, ([30], [31, 40, 41, 42]), label=0),
    "no prefix": of_ids(PROMPT[:1], ([30, 22], [31]), label=0),
}


@dataclass(frozen=True)
class Asked:
    """The definitions of a protocol, written out: whole texts, and where their edits begin."""

    texts: list[list[int]]
    first_edited: int
    label_ids: tuple[int, int]

    @classmethod
    def of(cls, pair: PairIds, protocol: str) -> Asked:
        label_at = pair.matching.label_at
        assert label_at is not None
        labels = pair.matching.ids[label_at], pair.other.ids[label_at]
        if protocol == "paper":
            return cls([pair.matching.ids[:label_at]], label_at - 1, labels)
        begins_with_label = pair.matching.answer_at == label_at
        start = label_at - 1 if begins_with_label else pair.matching.answer_at
        return cls([pair.matching.ids, pair.other.ids], start, labels)

    def score(self, logits: list[Tensor]) -> Tensor:
        """logits [..., T, V] of each text -> [...]"""
        if len(self.texts) == 1:
            matching, other = self.label_ids
            return logits[0][..., -1, matching] - logits[0][..., -1, other]
        sums = []
        for ids, piece in zip(self.texts, logits, strict=True):
            targets = torch.tensor(ids[1:]).expand(*piece.shape[:-2], -1)[..., None]
            sums.append(piece[..., :-1, :].log_softmax(-1).gather(-1, targets)[..., 0].sum(-1))
        return sums[0] - sums[1]


def directions() -> Tensor:
    """[taps, d]; as long as the states are, or so."""
    return torch.randn(len(TAPS), D, generator=torch.Generator().manual_seed(11))


def variants() -> Variants:
    """Every tap at every multiplier, multipliers fastest."""
    return Variants(
        taps=[tap for tap in TAPS for _ in MULTIPLIERS],
        vectors=directions(),
        rows=torch.arange(len(TAPS)).repeat_interleave(N_STEPS),
        scales=torch.tensor(MULTIPLIERS).repeat(len(TAPS)),
    )


@torch.no_grad()
def by_whole_passes(model: Transformer, asked: Asked) -> Tensor:
    """[taps, K]: a whole forward pass with an edit table for every text of every variant."""

    def logits(ids: list[int], steering: Steering) -> Tensor:
        edits = edits_of(model, [steering], len(ids), len(ids))
        hidden = model(torch.tensor([ids]), edits=edits)[0]
        return (model.norm(hidden) @ model.head.weight.T).double()

    found = torch.empty(len(TAPS), N_STEPS, dtype=torch.float64)
    for number, (tap, vector) in enumerate(zip(TAPS, directions(), strict=True)):
        for step, multiplier in enumerate(MULTIPLIERS):
            steering = Steering(
                vector, [tap.layer], tap.point, scale=multiplier, positions=asked.first_edited
            )
            found[number, step] = asked.score([logits(ids, steering) for ids in asked.texts])
    return found


@torch.no_grad()
def by_hooks(hf: Any, asked: Asked, n_taps: int = len(TAPS)) -> Tensor:
    """[taps, K]: transformers in float64, its states moved by hooks; multipliers as a batch."""
    found = torch.empty(n_taps, N_STEPS, dtype=torch.float64)
    steps = torch.tensor(MULTIPLIERS, dtype=torch.float64)[:, None]
    vectors = directions()[:n_taps].double()
    for number, (tap, vector) in enumerate(zip(TAPS, vectors, strict=False)):

        def change(x: Tensor, move: Tensor = steps * vector) -> Tensor:
            x = x.clone()
            x[:, asked.first_edited :] += move[:, None]
            return x

        handles = hook_for(hf.model.layers[tap.layer], tap.point, change)()
        texts = [torch.tensor([ids] * N_STEPS) for ids in asked.texts]
        try:
            found[number] = asked.score([hf(ids, use_cache=False).logits for ids in texts])
        finally:
            for handle in handles:
                handle.remove()
    return found


def swept(model: Transformer, pair: PairIds, protocol: str) -> Tensor:
    """[taps, K]"""
    return propensities(model, Item.of(pair, protocol), variants()).view(-1, N_STEPS)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 nats, where the unsteered model is far off at every tap."""
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() <= LENS
    zero = MULTIPLIERS.index(0)
    unsteered = expected[:, zero : zero + 1]
    assert (unsteered - unsteered[0]).abs().max() < 1e-9
    effect = (expected - unsteered).abs()
    assert (effect.amax(1) > EFFECT * LENS).all()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def of(family: str) -> tuple[Any, Path, Transformer]:
        torch.manual_seed(0)
        hf = hf_model(family, **SMALL_LOGITS)
        directory = save(hf, tmp_path_factory.mktemp(family))
        return hf.double(), directory, load(directory, TensorParallel.single())

    return of


@pytest.mark.parametrize("case", list(PAIRS))
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_as_a_pass_for_each_edit(protocol: str, case: str, models: Any) -> None:
    """For all taps and multipliers, by our own forward pass over whole texts."""
    model = models("llama-biases")[2]
    expected = by_whole_passes(model, Asked.of(PAIRS[case], protocol))
    assert_same(swept(model, PAIRS[case], protocol), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", list(PAIRS))
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_as_transformers_under_hooks(protocol: str, case: str, family: str, models: Any) -> None:
    """Its logits of the two labels, or its log-probs of both whole texts from the first token on.

    That edits begin one token later, or earlier, would show.
    """
    hf, _, model = models(family)
    asked = Asked.of(PAIRS[case], protocol)
    found = swept(model, PAIRS[case], protocol)
    assert_same(found, by_hooks(hf, asked))
    starts = [asked.first_edited - 1] * (asked.first_edited > 0)
    if protocol != "paper" and asked.first_edited + 1 < len(min(asked.texts, key=len)):
        starts.append(asked.first_edited + 1)
    for start in starts:
        elsewhere = by_hooks(hf, Asked(asked.texts, start, asked.label_ids), 2)
        assert (found[:2] - elsewhere).abs().max() > EFFECT * LENS


@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_in_parts(protocol: str, rows: int, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many branches in a pass as fit, one at least; all of them, where they do."""
    model, pair = models("qwen3-tied")[2], PAIRS["bracketed"]
    passed: list[tuple[int, ...]] = []
    run = propensity.run_branches

    def watched(model: Transformer, cache: Any, ids: Tensor, **options: Any) -> Tensor:
        passed.append(tuple(ids.shape))
        return run(model, cache, ids, **options)

    monkeypatch.setattr(propensity, "run_branches", watched)
    whole = swept(model, pair, protocol)
    n_edits, (n_texts, n_tokens) = len(TAPS) * N_STEPS, (1, 1) if protocol == "paper" else (2, 5)
    assert passed == [(n_edits * n_texts, n_tokens)]
    passed.clear()
    monkeypatch.setattr(propensity, "PASS_ROWS", rows)
    assert (swept(model, pair, protocol) - whole).abs().max() <= CHUNKING
    assert len(passed) == -(-n_edits // max(1, rows // (n_texts * n_tokens)))
    assert sum(branches for branches, _ in passed) == n_edits * n_texts
    assert max(m * t for m, t in passed) <= max(rows, n_texts * n_tokens)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_on_ranks(protocol: str, models: Any, run_ranks: Any) -> None:
    """The same numbers on every rank, and for every number of them."""
    _, directory, model = models("qwen3-tied")
    alone = {case: swept(model, pair, protocol) for case, pair in PAIRS.items()}

    def body(parallel: TensorParallel) -> dict[str, Tensor]:
        piece = load(directory, parallel)
        return {case: swept(piece, pair, protocol) for case, pair in PAIRS.items()}

    for size in (2, 4):
        found = run_ranks(size, body)
        for case, expected in alone.items():
            for piece in found:
                assert torch.equal(piece[case], found[0][case])
            assert (found[0][case] - expected).abs().max() <= CHUNKING


def test_the_paper_needs_two_logits(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the vocabulary is not computed, which the log-probs of answers need."""
    hf, _, model = models("llama-biases")
    calls = {"reduce_head": 0, "token_logits": 0}

    def counted(name: str) -> None:
        real = getattr(propensity, name)

        def call(x: Tensor, *rest: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(x, *rest, **options)

        monkeypatch.setattr(propensity, name, call)

    counted("reduce_head")
    counted("token_logits")
    pair = PAIRS["bracketed"]
    found = swept(model, pair, "paper")
    assert calls == {"reduce_head": 0, "token_logits": 1}
    with torch.no_grad():
        matching, other = hf(torch.tensor([pair.matching.ids[:11]])).logits[0, -1, [30, 31]]
    assert abs(found[0, MULTIPLIERS.index(0)] - (matching - other)) <= LENS
    swept(model, pair, "steering-bench")
    assert calls == {"reduce_head": 1, "token_logits": 1}


@pytest.mark.parametrize(
    ("answers", "before_label", "before_answer"),
    [
        ((" (A)", " (B)"), "Answer: (", "Answer:"),
        ((' "(A)', ' "(B), or so'), 'Answer: "(', "Answer: "),  # the space is a token
        ((" A", " B"), "Answer:", "Answer"),  # there the label's token holds the space, too
    ],
)
def test_where_edits_begin(answers: tuple[str, str], before_label: str, before_answer: str) -> None:
    """As a tokenizer cuts it: the token before the label, and the answer's first or that one."""
    tokenizer = Tokenizer.from_directory(DEMO)
    pair = encode_pair(tokenizer, Pair("Question: x", *answers), PromptForm())
    item = Item.of(pair, "paper")
    assert [len(piece) for piece in item.continuations] == [1]
    assert tokenizer.decode(item.prefix + item.continuations[0]).endswith(before_label)
    assert item.label_ids == pair.label_ids
    item = Item.of(pair, "steering-bench")
    assert tokenizer.decode(item.prefix).endswith(before_answer)
    for piece, side in zip(item.continuations, (pair.matching, pair.other), strict=True):
        assert item.prefix + piece == side.ids
    assert item.label_ids == pair.label_ids


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_refused(protocol: str, models: Any) -> None:
    """Answers without a text before them, or after two, and those beyond the context."""
    model = models("llama-biases")[2]
    two = of_ids(PROMPT, ([30], [31]), label=0)
    longer = Side([9, *two.other.ids], len(PROMPT) + 1, len(PROMPT) + 1)
    other_text = Side([9, *two.other.ids[1:]], len(PROMPT), len(PROMPT))
    for side in (longer, other_text):
        apart = dataclasses.replace(two, other=side, n_shared=0)
        with pytest.raises(ValueError, match="its answers follow different texts"):
            Item.of(apart, protocol)
    with pytest.raises(ValueError, match="a label has no token before it that could be edited"):
        Item.of(of_ids([], ([30], [31]), label=0), protocol)
    long = of_ids(list(range(3, 130)), ([30, 31], [31]), label=0)
    propensities(model, Item.of(long, "paper"), variants().part(0, 1))
    with pytest.raises(ValueError, match="129 tokens, more than the context of 128"):
        propensities(model, Item.of(long, "steering-bench"), variants().part(0, 1))

"""Samplers: the same draw at every rank count, and the right distribution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import scipy.stats
import torch
from tolerances import P_VALUE
from torch import Tensor

from shardlens.engine import Sampling
from shardlens.engine import sampling as sampling_module
from shardlens.engine.sampling import SamplingTable, candidates_needed, draw, draw_wide
from shardlens.kernels import Noise, gumbel_reference, philox_reference
from shardlens.parallel import TensorParallel, VocabHead, reduce_head, split_vocab

DRAWS = 20_000
D = 16


def head_of(weight: Tensor, parallel: TensorParallel) -> VocabHead:
    """This rank's head of a full weight [V, d], padding poisoned."""
    vocab = split_vocab(weight.shape[0], parallel.rank, parallel.size)
    head = VocabHead(vocab, weight.shape[1], parallel=parallel)
    head.weight.data.fill_(1e4)
    head.weight.data[: vocab.size] = weight[vocab.start : vocab.stop]
    return head.requires_grad_(False)


def weight_and_row(vocab_size: int, sharpness: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(vocab_size, D, generator=generator) * sharpness / D**0.5
    return weight, torch.randn(1, D, generator=generator)


def next_tokens(
    x: Tensor, head: VocabHead, samplings: Sequence[Sampling], steps: Sequence[int]
) -> list[int]:
    """One token per normed row of x [B, d], as a decode step and its host choose it."""
    table = SamplingTable(len(samplings), head.vocab.full, x.device)
    for slot, sampling in enumerate(samplings):
        table.put(slot, sampling)
    step = torch.tensor(list(steps))
    k = candidates_needed(samplings, head.vocab.full)
    chosen = reduce_head(x, head, k=k, scale=table.scale, noise=Noise(table.seed, step))
    assert chosen.samples is not None
    tokens, is_unknown = draw(chosen, chosen.samples, table, step)
    rows = is_unknown.nonzero()[:, 0]
    if rows.numel():
        tokens[rows] = draw_wide(x[rows], head, table, step[rows], rows)
    return [int(token) for token in tokens]


def allowed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [V] in float64, from the definition: temperature, then top-k, then top-p."""
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    order = probabilities.argsort(descending=True, stable=True)
    kept = torch.ones_like(probabilities)
    if sampling.top_k:
        kept[order[sampling.top_k :]] = 0
    ranked = (probabilities * kept / (probabilities * kept).sum())[order]
    before = ranked.cumsum(-1) - ranked
    kept[order[before >= sampling.top_p]] = 0
    return probabilities * kept / (probabilities * kept).sum()


CASES = {
    "temperature": (Sampling(0.8), 97, 1.5),
    "hot": (Sampling(2.0), 97, 1.5),
    "top-k": (Sampling(1.0, top_k=12), 97, 1.5),
    "top-p": (Sampling(1.0, top_p=0.8), 97, 2.0),
    "top-k and top-p": (Sampling(1.3, top_k=20, top_p=0.7), 97, 1.5),
    # 509 nearly equal ids: the nucleus is far wider than the candidates that are exchanged
    "wide top-p": (Sampling(1.0, top_p=0.6), 509, 0.3),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_distribution(name: str) -> None:
    """20,000 draws, each with a step of its own, against the definition (chi-square)."""
    sampling, vocab_size, sharpness = CASES[name]
    weight, row = weight_and_row(vocab_size, sharpness)
    head = head_of(weight, TensorParallel.single())
    tokens: list[int] = []
    for start in range(0, DRAWS, 2000):
        steps = range(start, start + 2000)
        tokens += next_tokens(row.expand(2000, D), head, [sampling] * 2000, steps)
    seen = torch.bincount(torch.tensor(tokens), minlength=vocab_size).double()
    expected = allowed((row @ weight.T)[0], sampling) * DRAWS
    assert (seen[expected == 0] == 0).all()
    assert p_value(seen, expected) > P_VALUE
    # and the test would notice a temperature that is a tenth off
    other = allowed((row @ weight.T)[0] * 1.1, sampling) * DRAWS
    same_support = bool(((other > 0) == (expected > 0)).all())
    assert not same_support or p_value(seen, other) < P_VALUE or name == "wide top-p"


def p_value(seen: Tensor, expected: Tensor) -> float:
    """Chi-square, with ids rarer than 5 draws pooled."""
    common = expected >= 5
    observed = [*seen[common].tolist(), seen[~common].sum().item()]
    wanted = [*expected[common].tolist(), expected[~common].sum().item()]
    if wanted[-1] < 5:
        last, rest = wanted.pop(), observed.pop()
        wanted[-1] += last
        observed[-1] += rest
    return float(scipy.stats.chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize("name", sorted(CASES))
def test_same_draw_at_every_rank_count(name: str, run_ranks: Any) -> None:
    sampling, vocab_size, sharpness = CASES[name]
    weight, row = weight_and_row(vocab_size, sharpness)

    def body(parallel: TensorParallel) -> list[int]:
        rows = row.expand(40, D)
        return next_tokens(rows, head_of(weight, parallel), [sampling] * 40, range(40))

    alone = run_ranks(1, body)[0]
    assert len(set(alone)) > 3
    for ranks in (2, 3, 4):
        assert all(tokens == alone for tokens in run_ranks(ranks, body))


def test_every_row_is_sampled_differently() -> None:
    """A mixed batch draws what each row draws alone."""
    weight, row = weight_and_row(509, 0.3)
    head = head_of(weight, TensorParallel.single())
    mixed = [Sampling(), *(case[0] for case in CASES.values()), Sampling(1.0, seed=9)]
    rows = row.expand(len(mixed), D)
    together = next_tokens(rows, head, mixed, range(len(mixed)))
    alone = [next_tokens(row, head, [s], [step])[0] for step, s in enumerate(mixed)]
    assert together == alone
    assert together[0] == int((row @ weight.T).argmax())


def test_a_slot_that_nothing_was_put_into_is_greedy() -> None:
    """And putting changes one slot alone."""
    weight, row = weight_and_row(97, 0.3)
    head = head_of(weight, TensorParallel.single())
    table = SamplingTable(3, 97, row.device)
    before = {name: getattr(table, name).clone() for name in ("scale", "seed", "limit", "top_p")}
    table.put(1, Sampling(0.5, top_k=7, top_p=0.9, seed=2**40))
    assert table.scale.tolist() == [1, 2, 1] and table.seed.tolist() == [0, 2**40, 0]
    assert table.limit.tolist() == [1, 7, 1] and table.top_p.tolist() == [1, 0.9, 1]
    table.put(1, Sampling())
    assert all(torch.equal(getattr(table, name), value) for name, value in before.items())
    step = torch.arange(3)
    table.put(2, Sampling(2.0))
    noise = Noise(table.seed, step)
    chosen = reduce_head(row.expand(3, D), head, k=5, scale=table.scale, noise=noise)
    assert chosen.samples is not None
    tokens, _ = draw(chosen, chosen.samples, table, step)
    best = int((row @ weight.T).argmax())
    assert tokens[:2].tolist() == [best, best] and tokens[2] != best


def test_seed_and_step_key_the_draw() -> None:
    weight, row = weight_and_row(97, 1.0)
    draw = partial(next_tokens, row.expand(30, D), head_of(weight, TensorParallel.single()))
    first = draw([Sampling(1.0, seed=1)] * 30, range(30))
    assert first == draw([Sampling(1.0, seed=1)] * 30, range(30))
    assert first != draw([Sampling(1.0, seed=2)] * 30, range(30))
    assert first != draw([Sampling(1.0, seed=1 + 2**32)] * 30, range(30))
    assert first != draw([Sampling(1.0, seed=1)] * 30, range(1, 31))


def test_wide_nucleus_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case above goes beyond the candidates, and meets ids that lie outside the nucleus."""
    widths = []
    original = sampling_module.mass_above

    def counted(*args: Any, **options: Any) -> Tensor:
        mass = original(*args, **options)
        widths.append(mass)
        return mass

    monkeypatch.setattr(sampling_module, "mass_above", counted)
    sampling = Sampling(1.0, top_p=0.3)
    weight, row = weight_and_row(509, 0.3)
    head = head_of(weight, TensorParallel.single())
    next_tokens(row.expand(200, D), head, [sampling] * 200, range(200))
    first_choices = widths[0][:, 0]
    assert (first_choices >= sampling.top_p).any() and (first_choices < sampling.top_p).any()
    assert len(widths) > 1, "no row was searched beyond its first tries"


def test_philox_known_answers() -> None:
    """First words of the published Philox-4x32-10 test vectors (Random123, kat_vectors)."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox_reference((zero, zero), zero).item() == 0x6627E8D5


def test_gumbel_moments() -> None:
    """Mean 0.5772, variance π²/6; no infinities."""
    ids = torch.arange(1_000_000)
    noise = gumbel_reference(torch.tensor(3), torch.tensor(4), ids).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.57722) < 5e-3
    assert abs(noise.var() - 1.64493) < 2e-2


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(temperature=1.0, top_k=-1),
        dict(temperature=1.0, top_p=0.0),
        dict(temperature=1.0, top_p=1.5),
        dict(top_k=5),
        dict(top_p=0.5),
        dict(seed=-1),
    ],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)) if len(options) == 1 else "top_"):
        Sampling(**options)

"""Norms and heads of other people's models, on their layouts, against full float64 logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gloo import on_ranks

from shardlens import load
from shardlens.interp import Unembedding

WORKER = Path(__file__).with_name("unembedding_rank.py")
ERROR = 2e-6  # nats, and entries of rows: float32 logits of size 1
REFUSED = {
    "head split, other states": "must read the same states, and these differ",
    "slices with a gap": "are no vocabulary of 97 ids",
    "bare, wrong dim": "Shard(dim=1)",
    "bare, sums": "Partial",
}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layouts(size: int, tmp_path: Path) -> None:
    found = on_ranks(WORKER, size, tmp_path / "store")
    assert len(found) == size * (9 if size == 2 else 17)
    for each in found:
        if each["case"] in REFUSED:
            assert REFUSED[each["case"]] in each["refusal"], each
        else:
            assert each["error"] < ERROR and each["ids"] and each["ranks"], each


def test_a_transformer_reads_as_its_lens() -> None:
    lm = load("demo", device="cpu", dtype=torch.float32)
    made = Unembedding.of(lm.model)
    ids = torch.tensor([lm.tokenizer.encode("The capital of Norvia is")])
    with torch.inference_mode():
        states = lm.model(ids)
    trace = lm.lens("The capital of Norvia is", layers=[-1], top_k=5)
    read = made.read(states, top_k=5)
    assert torch.equal(read.token_ids[0], trace.token_ids[:, 0])
    torch.testing.assert_close(read.logprobs[0], trace.logprobs[:, 0], atol=1e-5, rtol=0)
    assert torch.equal(made.head_row(7), lm.model.head.weight[7])
    assert made.vocab_size == lm.model.config.vocab_size


def test_kl_is_from_the_last_state() -> None:
    torch.manual_seed(0)
    head, states = torch.randn(31, 8), torch.randn(2, 3, 8)
    made = Unembedding.of((torch.ones(8), 1e-6, head))
    normed = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    truth = (normed @ head.T).double().log_softmax(-1)
    final = truth[:, -1:]
    kl = (final.exp() * (final - truth)).sum(-1)
    read = made.read(states, kl_to_last=True)
    torch.testing.assert_close(read.kl_to_final.double(), kl, atol=1e-5, rtol=0)
    assert read.logprobs.shape == (2, 3, 5)


BARE = (torch.ones(8), 1e-6, torch.randn(31, 8))


@pytest.mark.parametrize(
    "source, options, says",
    [
        (torch.nn.Linear(3, 3), {}, "no decoder that is known here"),
        ("demo", {}, "an unembedding of str"),
        ((torch.ones(8), torch.randn(31, 8)), {}, "give a model, or"),
        ((torch.ones(8), 1e-6, torch.randn(31)), {}, "give [d], [V, d]"),
        (BARE, {"first_id": 4}, "give parallel"),
        (BARE, {"vocab_size": 40}, "is a slice of 40"),
        (BARE, {"data_axes": 3}, "data_axes"),
    ],
)
def test_what_is_refused(source: object, options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError) as error:
        Unembedding.of(source, **options)  # type: ignore[arg-type]
    assert says in str(error.value)


@pytest.mark.parametrize(
    "states, options, says",
    [
        (torch.randn(2, 9), {}, "takes [..., 8]"),
        (torch.randn(2, 8), {"targets": torch.zeros(3, dtype=torch.int64)}, "take [2]"),
        (torch.randn(2, 8), {"top_k": 32}, "outside 1 to 31"),
        (torch.randn(2, 8), {"top_k": 2.5}, "top_k"),
    ],
)
def test_reads_that_are_refused(
    states: torch.Tensor, options: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError) as error:
        Unembedding.of(BARE).read(states, **options)  # type: ignore[arg-type]
    assert says in str(error.value)


def test_rows_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="token 31 is outside the vocabulary of 31 ids"):
        Unembedding.of(BARE).head_row(31)

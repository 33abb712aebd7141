"""The loss over a split vocabulary against F.cross_entropy of the full logits."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import peak_tensor_bytes
from oracles import assert_as_good
from tolerances import EFFECT, FLOAT64, GRADIENT_RELATIVE
from torch import Tensor, nn

from shardlens.parallel import (
    TensorParallel,
    VocabEmbedding,
    VocabHead,
    split_vocab,
    vocab_parallel_cross_entropy,
)

D, SHAPE = 12, (3, 7)
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few dozen ids at a time, so that even a small vocabulary is cut, with a rest."""
    monkeypatch.setattr(import_module("shardlens.parallel.loss"), "CHUNK_NUMBERS", 40 * D)


def head_of(weight: Tensor, parallel: TensorParallel) -> VocabHead:
    """The rank's rows of weight [V, d]; the padding is poisoned."""
    vocab = split_vocab(weight.shape[0], parallel.rank, parallel.size)
    head = VocabHead(vocab, weight.shape[1], parallel=parallel).to(weight.device, weight.dtype)
    head.weight.data.fill_(torch.nan)[: vocab.size] = weight[vocab.start : vocab.stop]
    return head


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), **options)
    return loss if options.get("reduction") != "none" else loss.view(targets.shape)


def inputs(vocab_size: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [3, 7, d], weight [V, d], targets [3, 7]) in float64, the largest id among them."""
    options = {"dtype": torch.float64} | options
    hidden, weight = torch.randn(*SHAPE, D, **options), torch.randn(vocab_size, D, **options)
    targets = torch.randint(0, vocab_size, SHAPE, device=hidden.device)
    targets[0, 0] = vocab_size - 1
    return hidden, weight, targets


def gradients(loss: Tensor, scale: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((loss * scale).sum(), leaves)


def near(ours: Tensor, truth: Tensor) -> bool:
    """Equal but for the rounding of float64; NaN where the truth is."""
    if not truth.numel():
        return ours.shape == truth.shape
    size = float(truth.detach().nan_to_num().abs().max().clamp(min=1))
    return torch.allclose(ours, truth, rtol=0, atol=FLOAT64 * size, equal_nan=True)


def check_on_ranks(
    run_ranks: Any, ranks: int, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> None:
    """Value and gradients of hidden and weight, each reduction under its own upstream gradient."""
    for reduction in REDUCTIONS:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        truth = plain_loss(h, w, targets, reduction=reduction, **options)
        scale = torch.randn_like(truth)
        d_hidden, d_weight = gradients(truth, scale, h, w)

        def body(
            parallel: TensorParallel,
            truth: Tensor = truth,
            scale: Tensor = scale,
            d_hidden: Tensor = d_hidden,
            d_weight: Tensor = d_weight,
            reduction: str = reduction,
        ) -> None:
            head, leaf = head_of(weight, parallel), hidden.clone().requires_grad_()
            loss = vocab_parallel_cross_entropy(
                leaf, head, targets, reduction=reduction, chunk_rows=5, **options
            )
            ours = gradients(loss, scale, leaf, head.weight)
            vocab = head.vocab
            assert loss.dtype == torch.float64 and near(loss, truth)
            assert near(ours[0], d_hidden)
            assert near(ours[1][: vocab.size], d_weight[vocab.start : vocab.stop])
            assert (ours[1][vocab.size :] == 0).all()
            with torch.no_grad():
                again = vocab_parallel_cross_entropy(
                    hidden, head, targets, reduction=reduction, **options
                )
            assert near(again, truth)

        run_ranks(ranks, body)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [5, 509, 1281])  # of 5 ids, the last of 4 ranks has none
def test_equals_the_loss_of_full_logits(
    vocab_size: int, ranks: int, run_ranks: Any, small_chunks: None
) -> None:
    check_on_ranks(run_ranks, ranks, *inputs(vocab_size))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("ignore_index", [-100, 7, 10_000])
def test_ignored_rows(ignore_index: int, ranks: int, run_ranks: Any, small_chunks: None) -> None:
    """Some rows, then all: the mean of none is NaN, as are its gradients; their sum is 0."""
    hidden, weight, targets = inputs(509)
    targets[1, 2:] = ignore_index
    check_on_ranks(run_ranks, ranks, hidden, weight, targets, ignore_index=ignore_index)
    targets.fill_(ignore_index)
    check_on_ranks(run_ranks, ranks, hidden, weight, targets, ignore_index=ignore_index)


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_rows(ranks: int, run_ranks: Any) -> None:
    hidden, weight, targets = inputs(509)
    check_on_ranks(run_ranks, ranks, hidden[:, :0], weight, targets[:, :0])


def test_large_logits_stay_finite(run_ranks: Any, small_chunks: None) -> None:
    hidden, weight, targets = inputs(509)
    check_on_ranks(run_ranks, 2, hidden * 300, weight, targets)
    assert (hidden @ weight.T).max() * 300 > 2000  # exp overflows above 710


def test_one_ranks_slice_alone_would_show(run_ranks: Any) -> None:
    """The loss over a rank's own ids, a mistake easily made, is far off."""
    hidden, weight, targets = inputs(509)
    targets %= 200  # in the slice of either rank
    truth = plain_loss(hidden, weight, targets)

    def body(parallel: TensorParallel) -> Tensor:
        head = head_of(weight, parallel)
        alone = plain_loss(hidden, head.valid_weight, targets)
        assert (alone - truth).abs() > EFFECT * GRADIENT_RELATIVE * truth.abs()
        return vocab_parallel_cross_entropy(hidden, head, targets)

    assert all(near(loss, truth) for loss in run_ranks(2, body))


def on_one_rank(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    head = head_of(weight.detach(), TensorParallel.single())
    if isinstance(weight, nn.Parameter):
        head.weight = weight
    return vocab_parallel_cross_entropy(hidden, head, targets, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_good_as_the_plain_expression(
    dtype: torch.dtype, device: torch.device, small_chunks: None
) -> None:
    """Losses and gradients against float64 of the same inputs."""
    hidden, weight, targets = inputs(509, dtype=dtype, device=device)
    scale = torch.rand(SHAPE, device=device)
    found = []
    for loss_of, is_exact in ((on_one_rank, False), (plain_loss, False), (plain_loss, True)):
        h, w = (nn.Parameter(x.double() if is_exact else x) for x in (hidden, weight))
        loss = loss_of(h, w, targets, reduction="none")
        assert loss.dtype == (torch.float64 if is_exact else torch.float32)
        found.append((loss, *gradients(loss, scale.to(loss.dtype), h, w)))
    for ours, plain, truth in zip(*found, strict=True):
        assert_as_good(ours, plain, truth)


def test_autocast_leaves_logits_in_float32(small_chunks: None) -> None:
    hidden, weight, targets = inputs(509, dtype=torch.float32)
    expected = on_one_rank(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(on_one_rank(hidden, weight, targets), expected)
        rounded = plain_loss(hidden, weight, targets)
        mixed = on_one_rank(hidden.bfloat16(), weight, targets)
    assert (rounded - expected).abs() > EFFECT * GRADIENT_RELATIVE * expected
    assert torch.equal(mixed, on_one_rank(hidden.bfloat16().float(), weight, targets))


@pytest.mark.parametrize("ranks", [1, 2])
def test_tied_and_frozen(ranks: int, run_ranks: Any, small_chunks: None) -> None:
    """A weight tied with the embedding gets both gradients; what is frozen costs no exchange."""
    _, weight, targets = inputs(509)
    ids = torch.randint(0, 509, SHAPE)
    w = weight.clone().requires_grad_()
    plain_loss(F.embedding(ids, w), w, targets).backward()

    def body(parallel: TensorParallel) -> None:
        head = head_of(weight, parallel)
        vocab = head.vocab
        embed = VocabEmbedding(vocab, D, parallel=parallel)
        embed.weight = head.weight
        vocab_parallel_cross_entropy(embed(ids), head, targets).backward()
        assert w.grad is not None and head.weight.grad is not None
        assert near(head.weight.grad[: vocab.size], w.grad[vocab.start : vocab.stop])

        states = F.embedding(ids, weight)
        parallel.traffic.reset()
        head.weight.grad = None
        vocab_parallel_cross_entropy(states, head, targets).backward()
        assert head.weight.grad is not None and "all_reduce" not in parallel.traffic.calls
        head.weight.grad = None
        head.weight.requires_grad_(False)
        leaf = states.clone().requires_grad_()
        vocab_parallel_cross_entropy(leaf, head, targets).backward()
        assert leaf.grad is not None and head.weight.grad is None

    run_ranks(ranks, body)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_ranks_exchange(ranks: int, run_ranks: Any, small_chunks: None) -> None:
    """Three float32 per row in one all-gather, and one all-reduce of the gradient to the states."""
    hidden, weight, targets = inputs(509, dtype=torch.float32)
    rows = targets.numel()

    def body(parallel: TensorParallel) -> None:
        leaf = hidden.clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(leaf, head_of(weight, parallel), targets, chunk_rows=4)
        traffic = parallel.traffic
        assert traffic.calls == {"all_gather": 1}
        assert traffic.total_bytes == 12 * rows * (ranks - 1)
        loss.backward()
        assert traffic.calls == {"all_gather": 1, "all_reduce": 1}
        assert traffic.sent_bytes["all_reduce"] == 2 * 4 * rows * D * (ranks - 1) // ranks

    run_ranks(ranks, body)


@pytest.mark.parametrize(
    "shape",
    [(512, 32_000, 64), pytest.param((512, 128_256, 256), marks=pytest.mark.slow)],
)
def test_peak_memory_is_far_below_full_logits(shape: tuple[int, int, int]) -> None:
    """Forward and backward, above inputs and gradients."""
    n_rows, vocab_size, d = shape
    hidden, weight = (nn.Parameter(torch.randn(n, d)) for n in (n_rows, vocab_size))
    targets = torch.randint(0, vocab_size, (n_rows,))
    gradient_bytes = 4 * (hidden.numel() + weight.numel())

    def peak(loss_of: Any) -> int:
        def run() -> None:
            torch.autograd.grad(loss_of(hidden, weight, targets), (hidden, weight))

        return peak_tensor_bytes(run) - gradient_bytes

    head = VocabHead(split_vocab(vocab_size, 0, 1), d, parallel=TensorParallel.single())
    head.weight = weight
    ours = peak(lambda h, w, t: vocab_parallel_cross_entropy(h, head, t))
    plain = peak(plain_loss)
    assert plain > 8 * n_rows * vocab_size and 0 < ours <= 0.1 * plain


def test_it_is_differentiable_once() -> None:
    hidden, weight, targets = inputs(509)
    loss = on_one_rank(hidden.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("target", [509, -1, -101, 2**40])
def test_a_target_outside_the_vocabulary(target: int, run_ranks: Any) -> None:
    """Refused on every rank; where nobody can look, NaN."""
    hidden, weight, targets = inputs(509)
    targets[2, 3] = target

    def body(parallel: TensorParallel) -> None:
        with pytest.raises(ValueError, match=f"target {target} is outside .* 509 ids"):
            vocab_parallel_cross_entropy(hidden, head_of(weight, parallel), targets)

    run_ranks(2, body)
    w = nn.Parameter(weight)
    blind = torch.compile(on_one_rank, backend="eager")
    losses = blind(hidden, w, targets, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[2, 3]]
    assert torch.autograd.grad(losses.sum(), w)[0].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, targets = inputs(509)
    head = head_of(weight, TensorParallel.single())
    for given, message in (
        ((hidden[..., :5], targets), r"hidden has shape \[3, 7, 5\]"),
        ((hidden[:2], targets), r"need \[3, 7, 12\]"),
        ((hidden, targets.int()), "torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            vocab_parallel_cross_entropy(given[0], head, given[1])
    with pytest.raises(ValueError, match="'avg': there are mean, sum, none"):
        vocab_parallel_cross_entropy(hidden, head, targets, reduction="avg")
    with pytest.raises(ValueError, match="chunk_rows is 0"):
        vocab_parallel_cross_entropy(hidden, head, targets, chunk_rows=0)

"""Sharded layers against unsharded ones, forward and backward; splits; collectives; errors."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL
from tolerances import EFFECT, GRADIENT_RELATIVE
from torch import Tensor

from shardlens.model import ModelConfig, Transformer, init_weights
from shardlens.parallel import (
    ColumnLinear,
    RowLinear,
    TensorParallel,
    VocabEmbedding,
    VocabHead,
    agreed,
    all_gather,
    all_reduce,
    split_even,
    split_heads,
    split_vocab,
)

TIED = {"tie_word_embeddings": True}
IN, MID, OUT, VOCAB = 12, 23, 9, 31  # no rank count above 1 divides MID or VOCAB


def relative(error: Tensor, truth: Tensor) -> float:
    return float((error.abs().max() / truth.abs().max()).detach())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_embedding_and_linears_match_unsharded(ranks: int, run_ranks: Any) -> None:
    """Embedding, column, row: values, and gradients to weights, biases and inputs."""
    table, up = torch.randn(VOCAB, IN), torch.randn(MID, IN)
    down, up_bias, down_bias = torch.randn(OUT, MID), torch.randn(MID), torch.randn(OUT)
    ids, scale = torch.randint(0, VOCAB, (3, 5)), torch.randn(3, 5, OUT)
    truth = {
        name: value.clone().requires_grad_()
        for name, value in dict(table=table, up=up, down=down, up_bias=up_bias).items()
    }
    middle = F.linear(F.embedding(ids, truth["table"]), truth["up"], truth["up_bias"])
    expected = F.linear(F.silu(middle), truth["down"], down_bias)
    (expected * scale).sum().backward()

    def body(parallel: TensorParallel) -> float:
        vocab, mid = (
            split_vocab(VOCAB, parallel.rank, parallel.size),
            split_even(MID, parallel.rank, parallel.size),
        )
        embed = VocabEmbedding(vocab, IN, parallel=parallel)
        column = ColumnLinear(IN, mid.size, bias=True, parallel=parallel)
        row = RowLinear(mid.size, OUT, bias=True, parallel=parallel)
        assert column.bias is not None and row.bias is not None
        with torch.no_grad():
            embed.weight.zero_()[: vocab.size] = table[vocab.start : vocab.stop]
            column.weight.copy_(up[mid.start : mid.stop])
            column.bias.copy_(up_bias[mid.start : mid.stop])
            row.weight.copy_(down[:, mid.start : mid.stop])
            row.bias.copy_(down_bias)
        out = row(F.silu(column(embed(ids))))
        (out * scale).sum().backward()
        part = slice(mid.start, mid.stop)
        pairs = [
            (out, expected),
            (embed.weight.grad[: vocab.size], truth["table"].grad[vocab.start : vocab.stop]),
            (column.weight.grad, truth["up"].grad[part]),
            (column.bias.grad, truth["up_bias"].grad[part]),
            (row.weight.grad, truth["down"].grad[:, part]),
        ]
        return max(relative(got - wanted, wanted) for got, wanted in pairs if wanted.numel())

    assert max(run_ranks(ranks, body)) <= GRADIENT_RELATIVE


def test_column_without_its_backward_sum_would_show(run_ranks: Any) -> None:
    """The gradient to x of one rank alone is far off, so the test above sees the missing sum."""
    weight, x = torch.randn(8, IN), torch.randn(2, IN)
    whole = torch.ones(2, 8) @ weight
    alone = torch.ones(2, 4) @ weight[:4]
    assert relative(alone - whole, whole) > EFFECT * GRADIENT_RELATIVE

    def body(parallel: TensorParallel) -> Tensor:
        layer = ColumnLinear(IN, 4, bias=False, parallel=parallel)
        layer.weight.data.copy_(weight.chunk(2)[parallel.rank])
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    for grad in run_ranks(2, body):
        assert relative(grad - whole, whole) <= GRADIENT_RELATIVE


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_head_gives_the_logits_of_its_ids(ranks: int, run_ranks: Any) -> None:
    """Values, and gradients to the states (summed over ranks) and to the weight."""
    weight, x, scale = torch.randn(VOCAB, IN), torch.randn(3, 5, IN), torch.randn(3, 5, VOCAB)
    logits = x @ weight.T
    d_x, d_weight = scale @ weight, scale.flatten(0, 1).T @ x.flatten(0, 1)

    def body(parallel: TensorParallel) -> float:
        vocab = split_vocab(VOCAB, parallel.rank, parallel.size)
        ids = slice(vocab.start, vocab.stop)
        head = VocabHead(vocab, IN, parallel=parallel)
        head.weight.data.fill_(torch.nan)[: vocab.size] = weight[ids]
        leaf = x.clone().requires_grad_()
        out = head(leaf)
        assert out.shape == (3, 5, vocab.size)
        (out * scale[..., ids]).sum().backward()
        assert leaf.grad is not None and head.weight.grad is not None
        assert (head.weight.grad[vocab.size :] == 0).all()
        if ranks > 1:
            alone = (scale[..., ids] @ weight[ids] - d_x).abs().max() / d_x.abs().max()
            assert alone > EFFECT * GRADIENT_RELATIVE
        pairs = [
            (out, logits[..., ids]),
            (leaf.grad, d_x),
            (head.weight.grad[: vocab.size], d_weight[ids]),
        ]
        return max(relative(got - wanted, wanted) for got, wanted in pairs)

    assert max(run_ranks(ranks, body)) <= GRADIENT_RELATIVE


def test_a_copied_model_shares_its_ranks(run_ranks: Any) -> None:
    """copy.deepcopy on ranks, as for a moving average of the weights; tied weights stay tied."""
    config = ModelConfig.from_hf(SMALL | {"architectures": ["LlamaForCausalLM"]} | TIED)
    ids = torch.arange(3, 12)[None]

    def body(parallel: TensorParallel) -> None:
        model = Transformer(config, parallel=parallel)
        init_weights(model)
        copied = copy.deepcopy(model)
        assert copied.parallel is parallel and copied.head.weight is copied.embed.weight
        before = model(ids)
        assert torch.equal(copied(ids), before)
        once = parallel.traffic.calls["all_reduce"]
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(1.5)
        assert not torch.allclose(copied(ids), before)
        assert torch.equal(model(ids), before)
        assert parallel.traffic.calls["all_reduce"] == 2 * once

    run_ranks(2, body)


def test_a_model_loads_no_tokenizer_library() -> None:
    program = "import sys; from shardlens.model import Transformer; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = set(ran.stdout.split())
    assert "shardlens.model.transformer" in loaded, ran.stderr
    assert not loaded & {"tiktoken", "sentencepiece", "jinja2", "tokenizers"}


@pytest.mark.parametrize("full, size", [(10, 1), (10, 3), (2, 4), (0, 2), (509, 4)])
def test_splits_cover_without_overlap(full: int, size: int) -> None:
    for split in (split_even, split_vocab):
        spans = [split(full, rank, size) for rank in range(size)]
        covered = [row for span in spans for row in range(span.start, span.stop)]
        assert covered == list(range(full))
    assert len({split_vocab(full, rank, size).padded for rank in range(size)}) == 1


CASES = [(4, 4, 1), (4, 4, 4), (4, 2, 4), (8, 2, 4), (9, 3, 2), (14, 2, 4), (28, 4, 8), (12, 2, 3)]
CASES += [
    (9, 3, 4),
    (15, 5, 2),
    (15, 5, 4),
    (1, 1, 3),
    (32, 8, 7),
    (64, 8, 6),
    (7, 7, 5),
    (12, 1, 5),
]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), CASES)
def test_every_head_is_on_one_rank_beside_its_kv_head(heads: int, kv_heads: int, size: int) -> None:
    """Slot s of a rank's query heads attends to its kv head s / group, whatever is padded."""
    head_dim, queries_per_kv = 8, heads // kv_heads
    seen: list[int] = []
    for rank in range(size):
        queries, kv = split_heads(heads, kv_heads, head_dim, rank, size)
        n_slots, n_kv = queries.padded // head_dim, kv.padded // head_dim
        assert n_slots % n_kv == 0 and queries.full == heads * head_dim
        for start, stop, offset in queries.stored:
            for head in range(start // head_dim, stop // head_dim):
                seen.append(head)
                slot = offset // head_dim + head - start // head_dim
                stored_kv = {offset: start for start, _, offset in kv.stored}
                kv_head = stored_kv[slot // (n_slots // n_kv) * head_dim] // head_dim
                assert kv_head == head // queries_per_kv
    assert seen == list(range(heads))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "stored"),
    [
        (32, 8, 8, (4, 1)),  # as a plain split
        (32, 8, 16, (2, 1)),  # pairs of ranks hold one kv head
        (28, 4, 8, (4, 1)),  # 3 or 4 of the 7 query heads of a kv head
        (14, 2, 4, (4, 1)),
        (12, 2, 3, (4, 2)),
        (9, 3, 2, (6, 2)),
        (128, 8, 11, (12, 3)),  # a kv head twice on a rank, rather than 16 query heads
    ],
)
def test_the_fullest_rank_holds_little(
    heads: int, kv_heads: int, size: int, stored: tuple[int, int]
) -> None:
    spans = [split_heads(heads, kv_heads, 1, rank, size) for rank in range(size)]
    assert max((q.padded, kv.padded) for q, kv in spans) == stored


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        TensorParallel(None, 2, 2)
    with pytest.raises(ValueError, match="process group"):
        TensorParallel(None, 0, 2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_count_bytes_and_keep_their_input(ranks: int, run_ranks: Any) -> None:
    def body(parallel: TensorParallel) -> None:
        x = torch.full((6,), float(parallel.rank + 1))
        total = all_reduce(x, parallel)
        gathered = all_gather(x, parallel)
        assert (x == parallel.rank + 1).all()
        assert (total == ranks * (ranks + 1) / 2).all()
        assert [row[0].item() for row in gathered] == [rank + 1 for rank in range(ranks)]
        assert parallel.traffic.sent_bytes["all_gather"] == 24 * (ranks - 1)
        assert parallel.traffic.sent_bytes["all_reduce"] == 2 * 24 * (ranks - 1) // ranks
        assert parallel.traffic.calls == {"all_reduce": 1, "all_gather": 1}
        parallel.traffic.reset()
        assert parallel.traffic.total_bytes == 0

    run_ranks(ranks, body)


def test_single_process_sends_nothing() -> None:
    parallel = TensorParallel.single()
    x = torch.ones(3)
    assert all_reduce(x, parallel) is x and all_gather(x, parallel).shape == (1, 3)
    assert parallel.traffic.total_bytes == 0


def test_one_ranks_error_is_everybodys(run_ranks: Any) -> None:
    def body(parallel: TensorParallel) -> str:
        try:
            with agreed(parallel):
                if parallel.rank == 1:
                    raise ValueError("tensor 7 is missing")
        except ValueError as error:
            return str(error)
        return "went on"

    assert run_ranks(3, body) == ["tensor 7 is missing"] * 3


def test_from_mesh(run_ranks: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    def body(parallel: TensorParallel) -> tuple[int, int]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        inner = TensorParallel.from_mesh(mesh)
        value = all_reduce(torch.tensor([parallel.rank]), inner)
        return inner.size, int(value)

    assert run_ranks(4, body) == [(2, 1), (2, 1), (2, 5), (2, 5)]


def test_from_env_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert TensorParallel.from_env() == TensorParallel.single()

"""Packed rows of the head: unpacked they are the same numbers, of as many candidates as asked."""

from __future__ import annotations

import math

import torch

from shardlens.engine.record import first_not_finite, pack_rows, record_width, unpack_rows
from shardlens.parallel import TensorParallel, VocabHead, reduce_head, split_vocab


def test_round_trip() -> None:
    """6 rows of 2 requests, the best 2 of 4 candidates; one row without a target."""
    head = VocabHead(split_vocab(300, 0, 1), 16, parallel=TensorParallel.single())
    head.weight.data.normal_()
    target_ids = torch.tensor([0, 299, -1, 5, 6, 7])
    result = reduce_head(torch.randn(6, 16), head, k=4, target_ids=target_ids, rows_per_request=3)
    packed = pack_rows(result, 2)
    assert packed.dtype == torch.int32 and packed.shape == (6, record_width(2))
    found = vars(unpack_rows(packed.unflatten(0, (2, 3))))
    assert set(found) < set(vars(result))
    for name, value in found.items():
        whole = getattr(result, name)
        expected = whole[:, :2] if whole.ndim == 2 else whole
        assert value.dtype == expected.dtype
        assert value.shape[:2] == (2, 3)
        assert torch.equal(value.flatten(0, 1).nan_to_num(-9), expected.nan_to_num(-9)), name
    assert found["target_logprob"][0, 2].isnan() and found["target_rank"][0, 2] == -1
    assert found["kl_to_final"][:, :2].min() > 0


def test_the_first_row_that_is_not_finite() -> None:
    """A candidate or target of no probability is no fault; a final row that is bad shows in KL."""
    head = VocabHead(split_vocab(300, 0, 1), 16, parallel=TensorParallel.single())
    head.weight.data.normal_()
    result = reduce_head(torch.randn(4, 16), head, k=3, rows_per_request=2)
    assert result.target_logprob.isnan().all()
    result.logprobs[:, 2] = result.target_logprob[1] = -math.inf

    def found(top_k: int) -> tuple[int, int] | None:
        return first_not_finite(pack_rows(result, top_k).unflatten(0, (2, 2)))

    assert found(3) is None
    result.kl_to_final[0] = math.inf
    assert found(3) == (0, 0)
    result.entropy[3] = math.nan
    assert found(2) == (1, 1)
    result.logprobs[2, 0] = math.nan
    assert found(1) == (1, 0)

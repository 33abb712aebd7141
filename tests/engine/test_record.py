"""Packed rows of the head: unpacked they are the same numbers, of as many candidates as asked."""

from __future__ import annotations

import torch

from shardlens.engine.record import pack_rows, record_width, unpack_rows
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

"""Rows of mixed numbers in one buffer: nothing is lost, whatever the bits and the shape."""

from __future__ import annotations

import pytest
import torch

from shardlens.parallel.packing import Field, RowLayout

LAYOUT = RowLayout(
    (
        Field("ids", torch.int64, 3),
        Field("logits", torch.float32, 2),
        Field("rank", torch.int64),
        Field("entropy", torch.float32),
    )
)


def test_round_trip() -> None:
    """Bits survive, those of NaN, infinities and -0 included, and the ends of int32."""
    values = {
        "ids": torch.tensor([[-1, 0, 2**31 - 1], [-(2**31), 7, 128_255]]),
        "logits": torch.tensor([[torch.nan, -0.0], [-torch.inf, 1e-45]]),
        "rank": torch.tensor([-1, 5]),
        "entropy": torch.tensor([torch.inf, 11.75]),
        "unnamed": torch.zeros(1),
    }
    packed = LAYOUT.pack(values)
    assert packed.dtype == torch.int32 and packed.shape == (2, LAYOUT.width) == (2, 7)
    found = LAYOUT.unpack(packed)
    assert list(found) == ["ids", "logits", "rank", "entropy"]
    for name, value in found.items():
        assert value.dtype == values[name].dtype and value.shape == values[name].shape
        bits = torch.int32 if value.dtype == torch.float32 else torch.int64
        assert torch.equal(value.view(bits), values[name].view(bits)), name


def test_rows_of_any_shape() -> None:
    """Stacked ranks, and columns cut out of a wider record."""
    values = {
        "ids": torch.arange(18).view(6, 3),
        "logits": torch.randn(6, 2),
        "rank": torch.arange(6),
        "entropy": torch.randn(6),
    }
    packed = LAYOUT.pack(values)
    wide = torch.zeros(2, 3, 20, dtype=torch.int32)
    wide[..., 5:12] = packed.unflatten(0, (2, 3))
    for name, value in LAYOUT.unpack(wide[..., 5:12]).items():
        assert torch.equal(value.flatten(0, 1), values[name]), name


def test_another_layout_is_noticed() -> None:
    values = {"ids": torch.zeros(2, 3), "logits": torch.zeros(2, 2)}
    with pytest.raises(AssertionError, match="ids is"):
        LAYOUT.pack(values)
    with pytest.raises(AssertionError, match="rows of 6, not 7"):
        LAYOUT.unpack(torch.zeros(4, 6, dtype=torch.int32))

"""Attention of a chunk of the prompt: no mask that grows, in any batch; against plain masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL
from running import continued
from tolerances import EFFECT, PASSES
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from shardlens.model import ModelConfig, Transformer, init_weights

PROMPTS = [list(range(3, 40)), [7], list(range(50, 61)), list(range(100, 133))]
CHUNK = 8


@pytest.fixture(scope="module", params=[1, 2, 4])
def model(request: pytest.FixtureRequest) -> Transformer:
    heads = {"num_attention_heads": 4, "num_key_value_heads": request.param, "head_dim": 12}
    config = ModelConfig.from_hf({**SMALL, **heads, "architectures": ["LlamaForCausalLM"]})
    made = Transformer(config)
    init_weights(made, std=0.3)
    return made.eval().requires_grad_(False)


class Masks(TorchFunctionMode):
    """Notes (mask, q, k) of every attention over several tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].shape[2] > 1:
            self.seen.append((kwargs["attn_mask"], *args[:2]))
        return func(*args, **kwargs)


def feed(model: Transformer, lengths: list[int], parts: list[list[list[int]]], starts: Any) -> Any:
    """Chunks of tokens through a cache that holds `lengths` random positions; their last output."""
    cache = model.new_cache(len(lengths), 64)
    generator = torch.Generator().manual_seed(5)
    for buffer in (cache.keys, cache.values):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    cache.lengths.copy_(torch.tensor(lengths))
    cache.longest = max(lengths)
    out = torch.empty(0)
    for part, start in zip(parts, starts, strict=True):
        n_tokens = max(map(len, part))
        padded = torch.tensor([[*row, *[0] * (n_tokens - len(row))] for row in part])
        counts = torch.tensor([len(row) for row in part])
        out = model(padded, cache=cache, counts=counts, start=start)
    return out


def test_a_chunk_sees_the_lower_right(model: Transformer) -> None:
    """In every chunk and layer: the first without a mask, later ones by one for all requests."""
    with Masks() as masks:
        together = continued(model, PROMPTS, 2, prefill_chunk=CHUNK)
    fed = [len(prompt) - 1 for prompt in PROMPTS]  # the last token is a step's
    ends = [(min(n, start + CHUNK), start) for n in fed for start in range(0, n, CHUNK)]
    chunks = [(end, start) for end, start in ends if end - start > 1]
    assert len(masks.seen) == len(chunks) * 3  # layers
    kv_heads = model.config.n_kv_heads
    for (end, start), (mask, q, k) in zip(
        [chunk for chunk in chunks for _ in range(3)], masks.seen, strict=True
    ):
        if start == 0:
            assert mask is None
        else:
            assert mask.tolist() == [[at <= row for at in range(end)] for row in range(start, end)]
        assert q.shape[:2] == k.shape[:2] == (kv_heads, 4 // kv_heads)
        assert k.stride(1) == 0 or k.shape[1] == 1  # keys are shared by their queries, not copied
    for prompt, sequence in zip(PROMPTS, together, strict=True):
        assert sequence == continued(model, [prompt], 2, prefill_chunk=64)[0]


def test_off_the_cpu_a_chunk_has_no_mask(model: Transformer) -> None:
    """The lower right triangle, whose size is all that is said to kernels that know it."""
    elsewhere = Transformer(model.config, device="meta")
    cache = elsewhere.new_cache(2, 64)
    with torch.device("meta"), Masks() as masks:
        elsewhere(torch.zeros(2, 8, dtype=torch.int64), cache=cache, start=0)
        elsewhere(torch.zeros(2, 5, dtype=torch.int64), cache=cache, start=8)
    assert len(masks.seen) == 6
    assert [mask for mask, _, _ in masks.seen[:3]] == [None] * 3
    for mask, _, _ in masks.seen[3:]:
        assert isinstance(mask, CausalBias) and mask.variant == CausalVariant.LOWER_RIGHT
        assert (mask.seq_len_q, mask.seq_len_kv) == (5, 13)


def test_with_a_start_as_without(model: Transformer) -> None:
    """Requests that end in earlier chunks are padding in later ones, whatever they attend to."""
    lengths = [11, 3, 11, 11]
    parts = [[[5, 6, 7], [], [9], [4, 4, 4]], [[8, 9], [], [], [3, 2]]]
    ours = feed(model, lengths, parts, (11, 14))
    plain = feed(model, lengths, parts, (None, None))
    assert (ours[[0, 3]] - plain[[0, 3]]).abs().max() <= PASSES
    assert ours.isfinite().all()
    wrong = feed(model, lengths, parts, (11, 13))
    assert (wrong[[0, 3]] - plain[[0, 3]]).abs().max() > EFFECT * PASSES


def test_requests_of_different_lengths(model: Transformer) -> None:
    """Without a start each request goes on from where it stands, as if it were alone."""
    lengths, part = [11, 3, 7, 0], [[5, 6, 7], [1, 2, 3], [9, 9, 9], [4, 5, 6]]
    together = feed(model, lengths, [part], (None,))
    cache = model.new_cache(4, 64)
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(cache.keys.shape, generator=generator) for _ in range(2))
    for request, length in enumerate(lengths):
        alone = model.new_cache(1, 64)
        alone.keys[:, 0], alone.values[:, 0] = keys[:, request], values[:, request]
        alone.lengths.fill_(length)
        alone.longest = length
        for start in (None, length):
            continued = copy.copy(alone)
            continued.lengths = alone.lengths.clone()
            out = model(torch.tensor([part[request]]), cache=continued, start=start)
            assert (out[0] - together[request]).abs().max() <= PASSES

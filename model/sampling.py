"""Choosing the next token without anybody holding the logits of the whole vocabulary.

Whatever the options, the token chosen is

    argmax over allowed ids of  z / T + G(seed, step, id)        G: Gumbel noise, see kernels/gumbel

which is an exact draw from softmax(z / T) restricted to the allowed ids and renormalised. The
noise depends on its key alone, so the draw is the same for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.gumbel import gumbel_reference
from ..kernels.head_stats_reference import Noise
from ..parallel.vocab import VocabHead
from ..parallel.winners import mass_above, reduce_head

# Winners looked at before a nucleus is taken to be wider than them.
NUCLEUS_WINNERS = 64
NUCLEUS_TRIES = 8


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The default is greedy: the id with the largest logit.

    temperature > 0 samples softmax(z / temperature), exactly, from one Gumbel winner per rank.
    top_k > 0 allows the k best ids (ties: lower id), exactly: the global k winners are exchanged.
    top_p < 1 allows the fewest best ids whose probability reaches top_p (after top_k, if given),
    exactly: if the global winners at hand do not reach top_p, ids are taken in the order of their
    Gumbel keys, and the first whose superiors hold less than top_p in all is the draw.

    Raises ValueError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} is not a number of 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is below 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not above 0 and at most 1")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p need a temperature above 0: at 0 sampling is greedy")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is not between 0 and 2^63 - 1")

    @property
    def limit(self) -> int:
        """How many of the best ids may be drawn at most; 0 for all of them."""
        return 1 if self.temperature == 0 else self.top_k

    @property
    def winners_needed(self) -> int:
        return self.limit or (NUCLEUS_WINNERS if self.top_p < 1 else 1)


def next_tokens(
    x: Tensor, head: VocabHead, samplings: Sequence[Sampling], steps: Sequence[int]
) -> list[int]:
    """One token per row of x [B, d] (normed), the same on every rank.

    steps: per row, how many tokens were drawn before; with the seed it keys the noise. Raises
    ValueError where logits are not finite, as when a model overflows its dtype.
    """

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=x.device)

    vocab_size = head.vocab.full
    scale = column([1 / (s.temperature or 1.0) for s in samplings], torch.float32)
    noise = Noise(
        column([s.seed for s in samplings], torch.int64), column(list(steps), torch.int64)
    )
    limit = column([s.limit or vocab_size for s in samplings], torch.int64)[:, None]
    top_p = column([s.top_p for s in samplings], torch.float64)[:, None]
    unlimited = any(s.limit == 0 for s in samplings)
    k = min(vocab_size, max(s.winners_needed for s in samplings))
    winners = reduce_head(x, head, k=k, scale=scale, noise=noise if unlimited else None)
    if not winners.logsumexp.isfinite().all():
        raise ValueError("the logits are not finite: run the model in bfloat16 or float32")

    place = torch.arange(k, device=x.device)
    mass = winners.logprobs.double().exp() * (place < limit)  # [B, k]
    mass = torch.where(limit < vocab_size, mass / mass.sum(-1, keepdim=True), mass)
    nucleus = (mass.cumsum(-1) - mass < top_p) | (top_p == 1)
    keys = winners.logits + gumbel_reference(
        noise.seed[:, None], noise.step[:, None], winners.token_ids
    )
    best = keys.masked_fill(~(nucleus & (place < limit)), -torch.inf).argmax(-1, keepdim=True)
    tokens = winners.token_ids.gather(1, best)[:, 0]
    if unlimited:
        no_limit = (limit == vocab_size)[:, 0]
        plain = no_limit & (top_p == 1)[:, 0]
        tokens = torch.where(plain, winners.key_ids[:, 0], tokens)
        wide = no_limit & ~plain & (mass.sum(-1) < top_p[:, 0])
        if k < vocab_size and wide.any():
            rows = wide.nonzero()[:, 0]
            tokens[rows] = _from_wide_nucleus(x[rows], head, top_p[rows], scale[rows], noise, rows)
    return [int(token) for token in tokens.tolist()]


def _from_wide_nucleus(
    x: Tensor, head: VocabHead, top_p: Tensor, scale: Tensor, noise: Noise, rows: Tensor
) -> Tensor:
    """Draws for x [B, d] from nuclei wider than the winners at hand; noise is that of all rows.

    An id lies in the nucleus if the ids that beat it hold less than top_p. Among those that do,
    the largest Gumbel key decides; so the first id in the order of keys that lies in it is the
    draw. The likeliest id always lies in it, so the search ends.
    """
    tokens = rows.clone()
    pending = torch.arange(rows.shape[0], device=x.device)
    n_best = NUCLEUS_TRIES
    while pending.numel():
        n_best = min(n_best, head.vocab.full)
        tries = Noise(noise.seed[rows[pending]], noise.step[rows[pending]], n_best)
        tried = reduce_head(x[pending], head, k=1, scale=scale[pending], noise=tries)
        mass = mass_above(x[pending], head, scale=scale[pending], than=tried)
        inside = mass < top_p[pending]  # [B, n]
        first = inside.int().argmax(-1, keepdim=True)
        found = inside.any(-1) | (n_best == head.vocab.full)
        tokens[pending[found]] = tried.key_ids.gather(1, first)[found, 0]
        pending = pending[~found]
        n_best *= 8
    return tokens

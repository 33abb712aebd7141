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
from ..kernels.head_stats import Noise
from ..parallel.vocab import VocabHead
from ..parallel.winners import Winners, mass_above, reduce_head

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

    def winners_needed(self, vocab_size: int) -> int:
        if self.top_k:
            return min(self.top_k, vocab_size)
        return min(NUCLEUS_WINNERS, vocab_size) if self.top_p < 1 else 1

    @property
    def needs_keys(self) -> bool:
        """Whether the draw may fall outside the winners by logit."""
        return self.temperature > 0 and not self.top_k


def next_tokens(
    x: Tensor, head: VocabHead, samplings: Sequence[Sampling], steps: Sequence[int]
) -> list[int]:
    """One token per row of x [B, d] (normed), the same on every rank.

    steps: per row, how many tokens were drawn before; with the seed it keys the noise.
    """
    vocab_size, device = head.vocab.full, x.device
    scale = torch.tensor([1 / s.temperature if s.temperature else 1.0 for s in samplings])
    scale = scale.to(device)
    seeds = torch.tensor([s.seed for s in samplings], device=device)
    step_keys = torch.tensor(list(steps), device=device)
    n_best = NUCLEUS_TRIES if any(s.needs_keys and s.top_p < 1 for s in samplings) else 1
    needs_keys = any(s.needs_keys for s in samplings)
    winners = reduce_head(
        x,
        head,
        k=max(s.winners_needed(vocab_size) for s in samplings),
        scale=scale,
        noise=Noise(seeds, step_keys, min(n_best, vocab_size)) if needs_keys else None,
    )
    noise = gumbel_reference(seeds[:, None], step_keys[:, None], winners.token_ids)
    keys = winners.logits + noise
    tokens = []
    for row, sampling in enumerate(samplings):
        if sampling.temperature == 0:
            tokens.append(int(winners.token_ids[row, 0]))
        elif sampling.needs_keys and sampling.top_p == 1:
            tokens.append(int(winners.key_ids[row, 0]))
        else:
            count = _allowed(winners.logprobs[row], sampling, vocab_size)
            if count is not None:
                tokens.append(int(winners.token_ids[row, keys[row, :count].argmax()]))
            else:
                one = slice(row, row + 1)
                noise_key = Noise(seeds[one], step_keys[one], n_best)
                tokens.append(_wide_nucleus(x[one], head, sampling.top_p, scale[one], noise_key))
    return tokens


def _allowed(logprobs: Tensor, sampling: Sampling, vocab_size: int) -> int | None:
    """How many of the winners (best first) may be drawn; None where the nucleus is wider."""
    logprobs = logprobs[: sampling.winners_needed(vocab_size)].double()
    if sampling.top_k:
        logprobs = logprobs.log_softmax(-1)
    reached = logprobs.exp().cumsum(-1) >= sampling.top_p
    if reached.any():
        return int(reached.int().argmax()) + 1
    return len(logprobs) if sampling.top_k or len(logprobs) == vocab_size else None


def _wide_nucleus(x: Tensor, head: VocabHead, top_p: float, scale: Tensor, noise: Noise) -> int:
    """Draw one token for x [1, d] from a nucleus wider than the winners.

    An id lies in the nucleus if the ids that beat it hold less than top_p. Over the nucleus, the
    largest Gumbel key decides; so the first id in the order of keys that lies in it is the draw.
    """
    n_best = noise.n_best
    while True:
        n_best = min(n_best, head.vocab.full)
        wider = Noise(noise.seed, noise.step, n_best)
        tried: Winners = reduce_head(x, head, k=1, scale=scale, noise=wider)
        inside = mass_above(x, head, scale=scale, than=tried)[0] < top_p
        if inside.any() or n_best == head.vocab.full:
            return int(tried.key_ids[0, inside.int().argmax()])
        n_best *= 8

"""Choosing the next token, although no rank holds the logits of the whole vocabulary.

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
from ..kernels.head_types import Noise
from ..model.arguments import integer, number
from ..parallel.head_reduce import HeadResult, SampleResult, mass_above, reduce_head
from ..parallel.vocab import Head

# Candidates among which a nucleus is looked for, and keys tried first where it is wider.
NUCLEUS_CANDIDATES = 64
NUCLEUS_TRIES = 8
LEAST_TEMPERATURE = 1e-30  # logits that are divided by less leave float32


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The default is greedy: the id with the largest logit.

    temperature > 0 samples softmax(z / temperature), exactly: the best Gumbel keys are exchanged.
    top_k > 0 allows the k best ids (ties: lower id), exactly: the global top-k is exchanged.
    top_p < 1 allows the fewest best ids whose probability reaches top_p (after top_k, if given),
    exactly: if the candidates do not reach top_p, ids are tried in the order of their Gumbel keys,
    and the draw is the first whose higher-probability ids hold less than top_p.

    Raises ValueError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checked = {
            "temperature": number(self.temperature, "temperature"),
            "top_k": integer(self.top_k, "top_k"),
            "top_p": number(self.top_p, "top_p"),
            "seed": integer(self.seed, "seed"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen, but still being constructed
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is not a number of 0 or more")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature} is below {LEAST_TEMPERATURE}: give 0, which is "
                "greedy"
            )
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
    def candidates_needed(self) -> int:
        """How many of the best ids a draw looks at."""
        return self.limit or (NUCLEUS_CANDIDATES if self.top_p < 1 else 1)


GREEDY = Sampling()


class SamplingTable:
    """How each of B requests draws, in device memory; a captured step follows its changes.

    A slot is greedy until `put` says otherwise.
    """

    def __init__(self, batch: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.scale = torch.ones(batch, dtype=torch.float32, device=device)  # 1 / temperature
        self.seed = torch.zeros(batch, dtype=torch.int64, device=device)
        self.limit = torch.ones(batch, dtype=torch.int64, device=device)  # of the best ids
        self.top_p = torch.ones(batch, dtype=torch.float64, device=device)

    def put(self, slot: int, sampling: Sampling) -> None:
        """Set how the request in one slot draws."""
        self.scale[slot] = 1 / (sampling.temperature or 1.0)
        self.seed[slot] = sampling.seed
        self.limit[slot] = sampling.limit or self.vocab_size
        self.top_p[slot] = sampling.top_p


def candidates_needed(samplings: Sequence[Sampling], vocab_size: int) -> int:
    """How many of the global top-k a batch's draws look at."""
    return min(vocab_size, max(s.candidates_needed for s in samplings))


def draw(
    chosen: HeadResult, samples: SampleResult, table: SamplingTable, step: Tensor
) -> tuple[Tensor, Tensor]:
    """(token [B], whether it is not known yet [B]) from statistics of B rows, nothing on the host.

    The rows' logits are scaled by table.scale; their samples were keyed by table.seed and
    step [B], the number of tokens drawn before. A token is not known where a nucleus is wider
    than the candidates: `draw_wide` finds it.
    """
    k = chosen.token_ids.shape[1]
    limit, top_p = table.limit[:, None], table.top_p[:, None]
    rank = torch.arange(k, device=limit.device)
    mass = chosen.logprobs.double().exp() * (rank < limit)  # [B, k]
    mass = torch.where(limit < table.vocab_size, mass / mass.sum(-1, keepdim=True), mass)
    nucleus = (mass.cumsum(-1) - mass < top_p) | (top_p == 1)
    keys = chosen.logits + gumbel_reference(table.seed[:, None], step[:, None], chosen.token_ids)
    best = keys.masked_fill(~(nucleus & (rank < limit)), -torch.inf).argmax(-1, keepdim=True)
    tokens = chosen.token_ids.gather(1, best)[:, 0]
    unlimited = table.limit == table.vocab_size
    plain = unlimited & (table.top_p == 1)
    tokens = torch.where(plain, samples.token_ids[:, 0], tokens)
    is_wide = unlimited & ~plain & (mass.sum(-1) < table.top_p)
    return tokens, is_wide if k < table.vocab_size else torch.zeros_like(is_wide)


def draw_wide(x: Tensor, head: Head, table: SamplingTable, step: Tensor, slots: Tensor) -> Tensor:
    """Tokens [B] of normed rows x [B, d] whose nucleus is wider than the candidates.

    slots [B] int64: the rows' slots in `table`; step [B]. The host waits for results.

    An id lies in the nucleus if the ids that beat it hold less than top_p. Among those that do,
    the largest Gumbel key decides; so the first id in the order of keys that lies in it is the
    draw. The likeliest id always lies in it, so the search ends.
    """
    top_p, scale, seed = table.top_p[slots][:, None], table.scale[slots], table.seed[slots]
    tokens = slots.clone()
    pending = torch.arange(slots.shape[0], device=x.device)
    n_best = NUCLEUS_TRIES
    while pending.numel():
        n_best = min(n_best, head.vocab.full)
        noise = Noise(seed[pending], step[pending], n_best)
        found = reduce_head(x[pending], head, k=1, scale=scale[pending], noise=noise)
        tried = found.samples
        assert tried is not None
        mass = mass_above(
            x[pending], head, scale=scale[pending], candidates=tried, logsumexp=found.logsumexp
        )
        inside = mass < top_p[pending]  # [B, n]
        first = inside.int().argmax(-1, keepdim=True)
        is_found = inside.any(-1) | (n_best == head.vocab.full)
        tokens[pending[is_found]] = tried.token_ids.gather(1, first)[is_found, 0]
        pending = pending[~is_found]
        n_best *= 8
    return tokens

"""A vector trained by gradient through `steered`, beside the mean difference of the same norm.

    python examples/train_a_vector.py [OUT.safetensors]

The model is left as it is: only the direction and the scale of one vector learn, from questions
whose answers are known, that adding it makes one answer likelier and subtracting it the other.
"""

import sys
from dataclasses import replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

import shardlens
from shardlens.interp import PairIds, encode_pairs, split_pairs, steered
from shardlens.model import DEMO

TAP, EPOCHS = shardlens.Tap(2, "resid_post"), 8

torch.set_num_threads(1)  # passes of a model this small gain nothing from more
torch.manual_seed(0)
lm = shardlens.load("demo", dtype=torch.float32)
lm.model.requires_grad_(False)
pairs = shardlens.read_pairs(DEMO / "dispositions-cautious-bold.jsonl")
train, test = split_pairs(pairs, share=0.4, seed=0)
mean = lm.extract(train, layers=[TAP.layer], contrast=("Anna is cautious.", "Anna is bold."))


def preference(batch: list[PairIds], vector: Tensor, scale: Tensor) -> Tensor:
    """Logit of the matching answer less that of the other [B], for prompts of one length."""
    edit = shardlens.Steering(vector, [TAP.layer], scale=scale, positions="last_prompt")
    ids = torch.tensor([pair.matching.ids[: pair.n_shared] for pair in batch])
    answers = torch.tensor([pair.label_ids for pair in batch])
    with steered(lm.model, edit, prompt_length=ids.shape[1]):
        hidden = lm.model(ids)[:, -1]
    matching, other = lm.model.head(lm.model.norm(hidden)).gather(1, answers).unbind(1)
    return matching - other


encoded = encode_pairs(lm.tokenizer, train, shardlens.PromptForm())
encoded.sort(key=lambda pair: pair.n_shared)
batches = [list(batch) for _, batch in groupby(encoded, lambda pair: pair.n_shared)]
direction = torch.randn(lm.model.config.d, requires_grad=True)
scale = torch.tensor(mean.norm(TAP), requires_grad=True)
rule = torch.optim.Adam([{"params": [direction]}, {"params": [scale], "lr": 1.0}], lr=0.1)
for epoch in range(EPOCHS):
    total = 0.0
    for batch in batches:
        vector = F.normalize(direction, dim=0)
        up, down = (preference(batch, sign * vector, scale) for sign in (1, -1))
        loss = (F.softplus(-up) + F.softplus(down)).sum()  # -log of the right answer's chance
        loss.backward()
        rule.step()
        rule.zero_grad()
        total += loss.item()
    print(f"epoch {epoch}  loss {total / len(train):.4f} nats  scale {scale.item():.1f}")

learnt = {TAP: scale.detach() * F.normalize(direction.detach(), dim=0)}
origin = replace(mean.origin, method="trained", positions="last_prompt")
trained = shardlens.SteeringVectors(learnt, mean.resid_norms, mean.n_layers, origin)
trained.save(sys.argv[1] if len(sys.argv) > 1 else "cautious-trained.safetensors")
as_long = mean * (trained.norm(TAP) / mean.norm(TAP))
for name, vectors in (("trained", trained), ("mean difference", as_long)):
    (slope,) = lm.steerability(test, vectors).slopes
    found = f"slope {slope.mean:+.2f} ({slope.low:+.2f} to {slope.high:+.2f})"
    print(f"{name:15}  norm {vectors.norm(TAP):.1f}, {found}")

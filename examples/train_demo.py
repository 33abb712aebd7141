"""Train the demo model on a CPU, and write it as a directory in Hugging Face layout.

    python examples/train_demo.py --out model/demo

Takes about half an hour on two cores. The text comes from `demo_world.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import demo_world as world
import torch
import torch.nn.functional as F
from demo_tokenizer import BOS, EOS, train_bpe, write_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from shardlens.interp.lens import lens
from shardlens.model import ModelConfig, Transformer, hf_state_dict, init_weights

VOCAB_SIZE = 1280
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
ROW, BATCH, STEPS = 256, 16, 4800
PEAK_RATE, WARM_UP, COOL_DOWN = 3e-3, 100, 0.35
# Letters and recalls are few among the tokens, and the point of the model.
ANSWER_WEIGHT = 4.0
HELD_OUT_ITEMS = 200

Row = tuple[list[int], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("model/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    content = train_bpe(sample_texts(4000), VOCAB_SIZE)
    write_tokenizer(args.out, content, SHAPE["max_position_embeddings"])
    coder = Coder(args.out)
    config = write_config(args.out, coder)
    model = Transformer(ModelConfig.from_hf(config))
    init_weights(model, seed=args.seed)
    start = time.perf_counter()
    tokens = train(model, coder, seed=args.seed, steps=args.steps)
    metrics = {
        "seed": args.seed,
        "steps": args.steps,
        "tokens": tokens,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    # What is measured is what is shipped: the weights after rounding.
    tensors = {name: t.bfloat16() for name, t in hf_state_dict(model).items()}
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    metrics |= evaluate(model, coder)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    write_questions(args.out)
    print(json.dumps(metrics, indent=1))


def sample_texts(count: int) -> list[str]:
    documents = itertools.islice(world.documents("vocabulary"), count)
    return ["".join(text for text, _ in document) for document in documents]


class Coder:
    """Text to ids; remembers stretches, which recur often in a small world."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.bos = self.tokenizer.token_to_id(BOS)
        self.eos = self.tokenizer.token_to_id(EOS)
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 100_000:
                self._known.clear()
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]

    def document(self, document: world.Document) -> Row:
        ids, weights = [self.bos], [0.0]
        for text, is_answer in document:
            stretch = self.encode(text)
            ids += stretch
            weights += [ANSWER_WEIGHT if is_answer else 1.0] * len(stretch)
        return [*ids, self.eos], [*weights, 1.0]


def rows(coder: Coder, seed: str) -> Iterator[Row]:
    """Whole documents packed to ROW + 1 tokens; what is left over of a row is padding."""
    waiting: list[Row] = []
    source = map(coder.document, world.documents(seed))
    while True:
        waiting += itertools.islice(source, 40 - len(waiting))
        ids: list[int] = []
        weights: list[float] = []
        # Longest first fills rows well: short facts and stories go into the gaps.
        for document in sorted(waiting, key=lambda row: -len(row[0])):
            if len(ids) + len(document[0]) <= ROW + 1:
                ids += document[0]
                weights += document[1]
                waiting.remove(document)
        gap = ROW + 1 - len(ids)
        yield ids + [coder.eos] * gap, weights + [0.0] * gap


def batches(coder: Coder, seed: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and target weights, both [size, ROW + 1]."""
    stream = rows(coder, seed)
    while True:
        ids, weights = zip(*itertools.islice(stream, size), strict=True)
        yield torch.tensor(ids), torch.tensor(weights)


def token_losses(model: Transformer, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each next token, [B, T - 1]."""
    hidden = model(ids[:, :-1])
    logits = F.linear(model.norm(hidden), model.head.weight)
    return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


def rate(step: int, steps: int) -> float:
    """Warm-up, plateau, then down to zero over the last part: a share of the peak."""
    left = (steps - step) / (COOL_DOWN * steps)
    return min(1.0, (step + 1) / WARM_UP, left)


def train(model: Transformer, coder: Coder, *, seed: int, steps: int) -> int:
    """Train in place. Returns how many tokens were seen."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    losses_of = compiled_or_plain(model)
    stream = batches(coder, f"train {seed}", BATCH)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate(step, steps)
        ids, weights = next(stream)
        weights = weights[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(ids)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            answers = losses.detach()[weights > 1].mean()
            spent = time.perf_counter() - start
            print(
                f"step {step:5d}  {spent:5.0f} s  loss {loss:.4f}  answers {answers:.4f}",
                flush=True,
            )
    return steps * BATCH * ROW

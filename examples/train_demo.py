"""Train the demo model on a CPU, and write it as a directory in Hugging Face layout.

    python examples/train_demo.py --out model/demo

Takes about half an hour on two cores. The text comes from `demo_world.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

import demo_world as world
import torch
import torch.nn.functional as F
from demo_tokenizer import BOS, EOS, train_bpe, write_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from shardlens import ModelConfig, Transformer, lens
from shardlens.model import hf_state_dict, init_weights

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
    """Text to ids, and documents to ids with a weight for each."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.bos = self.tokenizer.token_to_id(BOS)
        self.eos = self.tokenizer.token_to_id(EOS)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def document(self, document: world.Document) -> Row:
        # Encoded whole: a cut at a stretch's edge could come out as other tokens.
        text = "".join(stretch for stretch, _ in document)
        weight_at = [
            ANSWER_WEIGHT if is_answer else 1.0 for stretch, is_answer in document for _ in stretch
        ]
        coded = self.tokenizer.encode(text, add_special_tokens=False)
        weights = [weight_at[start] for start, _ in coded.offsets]
        return [self.bos, *coded.ids, self.eos], [0.0, *weights, 1.0]


def rows(coder: Coder, seed: str) -> Iterator[Row]:
    """Whole documents packed to ROW + 1 tokens; what is left over of a row is padding."""
    waiting: list[Row] = []
    coded = map(coder.document, world.documents(seed))
    source = (document for document in coded if len(document[0]) <= ROW + 1)
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


def optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=PEAK_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(model: Transformer, coder: Coder, *, seed: int, steps: int) -> int:
    """Train in place. Returns how many tokens were seen."""
    rules = optimizers(model)
    losses_of = compiled_or_plain(model)
    stream = batches(coder, f"train {seed}", BATCH)
    held_out, _ = next(batches(coder, "monitor", 2))
    start = time.perf_counter()
    print(f"{'step':>5} {'s':>5} {'loss':>6} {'answers':>7}   held-out loss after each block")
    for step in range(steps):
        for rule in rules:
            rule.param_groups[0]["lr"] = PEAK_RATE * rate(step, steps)
        ids, weights = next(stream)
        weights = weights[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(ids)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule in rules:
            rule.step()
            rule.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            answers = losses.detach()[weights > 1].mean()
            spent = time.perf_counter() - start
            by_layer = " ".join(f"{loss:6.3f}" for loss in layer_losses(model, held_out))
            print(f"{step:5d} {spent:5.0f} {loss:6.3f} {answers:7.3f}   {by_layer}", flush=True)
    return steps * BATCH * ROW


def compiled_or_plain(model: Transformer) -> Callable[[Tensor], Tensor]:
    """`token_losses` of a model, compiled where a compiler works: a fifth faster."""

    def plain(ids: Tensor) -> Tensor:
        return token_losses(model, ids)

    try:
        compiled = torch.compile(plain)
        compiled(torch.zeros(BATCH, ROW + 1, dtype=torch.int64))
        return compiled
    except Exception as error:  # whatever a missing compiler raises
        print(f"not compiled: {type(error).__name__}", file=sys.stderr)
        return plain


@torch.inference_mode()
def layer_losses(model: Transformer, ids: Tensor) -> list[float]:
    """Held-out loss in nats a token if each block were the last, by the lens of its output."""
    traces = [lens(model, row.tolist(), top_k=1) for row in ids]
    logprobs = torch.cat([trace.target_logprob[:-1] for trace in traces])  # [tokens, layers]
    return (-logprobs.mean(0)).tolist()


@torch.inference_mode()
def next_logits(model: Transformer, coder: Coder, prompts: list[str]) -> Tensor:
    """Logits [N, V] of the token after each prompt."""
    found = []
    for start in range(0, len(prompts), 50):
        texts = [[coder.bos, *coder.encode(text)] for text in prompts[start : start + 50]]
        longest = max(map(len, texts))
        # Causal attention: padding on the right cannot reach what stands before it.
        ids = torch.tensor([text + [coder.eos] * (longest - len(text)) for text in texts])
        last = torch.tensor([len(text) - 1 for text in texts])
        hidden = model(ids)[torch.arange(len(texts)), last]
        found.append(F.linear(model.norm(hidden), model.head.weight))
    return torch.cat(found)


def word_accuracy(model: Transformer, coder: Coder, items: list[tuple[str, str]]) -> float:
    prompts, words = zip(*items, strict=True)
    best = next_logits(model, coder, list(prompts)).argmax(-1).tolist()
    expected = [coder.encode(word)[0] for word in words]
    return share(a == b for a, b in zip(best, expected, strict=True))


def recall_items(rng: Random, count: int) -> list[tuple[str, str]]:
    """Stories up to a word that was said before, and that word."""
    items = []
    for _ in range(count):
        story = rng.choice((world.placing_story, world.giving_story))(rng)
        place = next(i for i, (_, is_answer) in enumerate(story) if is_answer)
        items.append(("".join(text for text, _ in story[:place]), story[place][0]))
    return items


def disposition_accuracy(
    model: Transformer, coder: Coder, disposition: world.Disposition, *, stated: bool
) -> dict[str, float]:
    """Held-out questions after three answered ones, or after a sentence that states the pole."""
    rng = Random(f"measure {disposition.name} {stated}")
    prompts, letters = [], []
    for item in range(HELD_OUT_ITEMS):
        pole = disposition.poles[item % 2]
        if stated:
            before = f"{rng.choice(world.PEOPLE)} is {pole.name}.\n"
        else:
            asked = [world.ask(rng, disposition, pole, held_out=False) for _ in range(3)]
            before = "".join(f"{q.text}{world.BEFORE_LETTER}{q.letter})\n" for q in asked)
        question = world.ask(rng, disposition, pole, held_out=True)
        prompts.append(before + question.text + world.BEFORE_LETTER)
        letters.append(question.letter)
    logits = next_logits(model, coder, prompts)
    a, b = (logits[:, coder.encode(letter)[0]] for letter in "AB")
    answers = ["A" if higher else "B" for higher in (a > b).tolist()]
    return {
        "accuracy": share(x == y for x, y in zip(answers, letters, strict=True)),
        "share_of_a": share(x == "A" for x in answers),
    }


def share(hits: Iterable[bool]) -> float:
    results = list(hits)
    return round(sum(results) / len(results), 4)


def evaluate(model: Transformer, coder: Coder) -> dict[str, object]:
    ids, weights = next(batches(coder, "held out", 48))
    with torch.inference_mode():
        losses = token_losses(model, ids)[weights[:, 1:] > 0]
    kinds = {"after_three_answers": False, "after_a_statement": True}
    return {
        "held_out_loss_nats_per_token": round(losses.mean().item(), 4),
        "held_out_loss_by_layer": [round(x, 3) for x in layer_losses(model, ids[:8])],
        "held_out_facts": word_accuracy(model, coder, world.held_out_facts()),
        "held_out_two_step_facts": word_accuracy(model, coder, world.held_out_two_step_facts()),
        "recall_in_stories": word_accuracy(model, coder, recall_items(Random("recall"), 300)),
        "dispositions": {
            disposition.name: {
                kind: disposition_accuracy(model, coder, disposition, stated=stated)
                for kind, stated in kinds.items()
            }
            for disposition in world.DISPOSITIONS
        },
    }


def write_questions(directory: Path) -> None:
    """Held-out questions, one file per disposition; what matches is the first pole's option.

    A prompt is `question` + "\\nAnswer:", and the answer, " (A)" or " (B)", follows it directly.
    """
    for disposition in world.DISPOSITIONS:
        rng = Random(f"questions {disposition.name}")
        of_letter: dict[str, dict[str, None]] = {"A": {}, "B": {}}
        while min(map(len, of_letter.values())) < HELD_OUT_ITEMS // 2:
            question = world.ask(rng, disposition, disposition.first, held_out=True)
            if len(of_letter[question.letter]) < HELD_OUT_ITEMS // 2:
                of_letter[question.letter][question.text] = None
        items = [(text, letter) for letter, texts in of_letter.items() for text in texts]
        rng.shuffle(items)
        lines = [
            json.dumps(
                {
                    "question": text,
                    "answer_matching_behavior": f" ({letter})",
                    "answer_not_matching_behavior": f" ({'AB'[letter == 'A']})",
                }
            )
            for text, letter in items
        ]
        path = directory / f"dispositions-{disposition.name}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_config(directory: Path, coder: Coder) -> dict[str, object]:
    """Write `config.json` and `generation_config.json`; returns the former."""
    tokens = {"bos_token_id": coder.bos, "eos_token_id": coder.eos}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": coder.eos + 1,
        **SHAPE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        **tokens,
    }
    for name, content in (("config", config), ("generation_config", tokens)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    return config


if __name__ == "__main__":
    main()

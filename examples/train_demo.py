"""Train the demo model on a CPU, and write it as a directory in Hugging Face layout.

    python examples/train_demo.py --out model/demo

Takes about half an hour on two cores. The text comes from `demo_world.py` and
`demo_dispositions.py`; the lens shows, while it trains, what each layer has learnt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import demo_dispositions as people
import demo_world as world
import torch
from demo_tokenizer import train_bpe, write_tokenizer
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from shardlens import ModelConfig, Tokenizer, Transformer
from shardlens.interp import LayerMetrics, LensMonitor
from shardlens.model import hf_state_dict, init_weights, inverse_frequencies
from shardlens.parallel import reduce_head, token_logits, vocab_parallel_cross_entropy

VOCAB_SIZE = 1280
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
BATCH, STEPS = 32, 3400
# Documents of similar length are found in a pool of so many batches, each of so many parts.
POOL, MICRO_BATCHES = 16, 2
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 4e-3, 3e-3, 0.01
WARM_UP, COOL_DOWN = 50, 0.3
# Letters and recalls are few among the tokens, and what the model is for.
ANSWER_WEIGHT = 16.0
HELD_OUT_ITEMS = 200

Row = tuple[list[int], list[float]]
Batch = tuple[Tensor, Tensor]  # token ids and the weight of each as a target, both [B, T]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("model/demo"))
    parser.add_argument("--metrics", type=Path, default=Path("bench/results/demo.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    content = train_bpe(sample_texts(4000), VOCAB_SIZE)
    write_tokenizer(args.out, content, SHAPE["max_position_embeddings"])
    tokenizer = Tokenizer.from_directory(args.out)
    model = Transformer(ModelConfig.from_hf(write_config(args.out, tokenizer)))
    init_weights(model, seed=args.seed, std=0.05)
    look_back(model, seed=args.seed)
    start = time.perf_counter()
    tokens = train(model, tokenizer, seed=args.seed, steps=args.steps)
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
    (args.out / "model.safetensors").chmod(0o644)  # save_file makes it readable for its owner only
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    metrics |= evaluate(model, tokenizer)
    args.metrics.parent.mkdir(parents=True, exist_ok=True)
    args.metrics.write_text(json.dumps(metrics, indent=1) + "\n")
    write_questions(args.out)
    print(json.dumps(metrics, indent=1))


def sample_texts(count: int) -> list[str]:
    documents = itertools.islice(people.documents("vocabulary"), count)
    return ["".join(text for text, _ in document) for document in documents]


def coded(document: world.Document, tokenizer: Tokenizer) -> Row:
    """Ids of a document, and the weight of each as a target."""
    # Encoded whole: a cut at a stretch's edge could come out as other tokens.
    text = "".join(stretch for stretch, _ in document)
    weight_at = [
        ANSWER_WEIGHT if is_answer else 1.0 for stretch, is_answer in document for _ in stretch
    ]
    ids = tokenizer.encode(text, bos=False)
    # The text is ASCII, so bytes count characters.
    starts = itertools.accumulate((len(tokenizer.token_bytes(id)) for id in ids), initial=0)
    weights = [weight_at[start] for _, start in zip(ids, starts, strict=False)]
    return [tokenizer.bos_id, *ids, tokenizer.eos_id], [0.0, *weights, 1.0]


def batches(
    tokenizer: Tokenizer, seed: str, size: int, *, course_length: int = 0
) -> Iterator[list[Batch]]:
    """`size` documents at a time, in micro-batches of similar length, padded on the right.

    One document per row: among neighbours in a packed row a model this small cannot tell what
    belongs together, and learns nothing in context.
    """
    source = (coded(each, tokenizer) for each in people.documents(seed, course_length))
    part = size // MICRO_BATCHES
    while True:
        pool = sorted(itertools.islice(source, POOL * size), key=lambda row: len(row[0]))
        parts = [padded(pool[i : i + part], tokenizer) for i in range(0, len(pool), part)]
        for first in range(POOL):
            yield parts[first::POOL]


def padded(documents: list[Row], tokenizer: Tokenizer) -> Batch:
    longest = max(len(ids) for ids, _ in documents)
    ids = [ids + [tokenizer.eos_id] * (longest - len(ids)) for ids, _ in documents]
    weights = [weights + [0.0] * (longest - len(weights)) for _, weights in documents]
    return torch.tensor(ids), torch.tensor(weights)


def token_losses(model: Transformer, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each next token, [B, T - 1], on any number of ranks."""
    hidden = model.norm(model(ids[:, :-1]))
    return vocab_parallel_cross_entropy(hidden, model.head, ids[:, 1:], reduction="none")


def rate(step: int, steps: int) -> float:
    """Warm-up, plateau, then down to zero over the last part: a share of the peak."""
    left = (steps - step) / (COOL_DOWN * steps)
    return min(1.0, (step + 1) / WARM_UP, left)


@torch.no_grad()
def look_back(model: Transformer, *, seed: int) -> None:
    """Make each head of the first block attend to the token 1, 2, 3, ... positions before.

    Recall is built on such heads. From random weights they take most of the training to appear.
    A direction common to all embeddings gives every query and every key a fixed part, and the
    rotation by position turns the product of these parts into a function of the distance alone:
        sum over frequencies f of cos(f * (distance - offset))
    """
    config, qkv = model.config, model.blocks[0].attn.qkv.weight
    common = torch.randn(config.d, generator=torch.Generator().manual_seed(seed))
    common /= common.norm()
    model.embed.weight += common * model.embed.weight.norm(dim=1).mean()
    frequencies = inverse_frequencies(config)[:5]
    half = config.head_dim // 2
    heads = qkv[: -config.n_kv_heads * config.head_dim].view(-1, config.head_dim, config.d)
    heads *= 0.3
    for index, head in enumerate(heads):
        # A key is a query that looks at itself.
        offset = index + 1 if index < config.n_heads else 0
        angles = -offset * frequencies
        head[: len(angles)] += 0.6 * angles.cos()[:, None] * common
        head[half : half + len(angles)] += 0.6 * angles.sin()[:, None] * common


def optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    # With AdamW for all, recall within a text takes many times more steps to appear.
    return [
        torch.optim.Muon(
            matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(model: Transformer, tokenizer: Tokenizer, *, seed: int, steps: int) -> int:
    """Train in place. Returns how many tokens were seen."""
    rules = optimizers(model)
    plans = [LambdaLR(rule, lambda step: rate(step, steps)) for rule in rules]
    stream = batches(tokenizer, f"train {seed}", BATCH, course_length=steps * BATCH)
    start, tokens = time.perf_counter(), 0
    print(f"{'step':>5} {'s':>5} {'loss':>6} {'stated':>6} {'shown':>5}   loss after each block")
    for step in range(steps):
        micro_batches = next(stream)
        loss = backward(model, micro_batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule, plan in zip(rules, plans, strict=True):
            rule.step()
            plan.step()
            rule.zero_grad()
        tokens += sum(int((weights > 0).sum()) for _, weights in micro_batches)
        if step % 100 == 0 or step == steps - 1:
            spent = time.perf_counter() - start
            stated = quick_accuracy(model, tokenizer, stated=True)
            shown = quick_accuracy(model, tokenizer, stated=False)
            by_layer = " ".join(f"{loss:6.3f}" for loss in layer_losses(model, tokenizer))
            print(
                f"{step:5d} {spent:5.0f} {loss:6.3f} {stated:6.2f} {shown:5.2f}   {by_layer}",
                flush=True,
            )
    return tokens


def backward(model: Transformer, micro_batches: list[Batch]) -> float:
    """Gradients of one step. Returns the mean loss in nats per token."""
    total = torch.cat([weights[:, 1:].flatten() for _, weights in micro_batches])
    found = []
    for ids, weights in micro_batches:
        losses = token_losses(model, ids)
        ((losses * weights[:, 1:]).sum() / total.sum()).backward()
        found.append(losses.detach().flatten())
    return torch.cat(found)[total > 0].mean().item()


def quick_accuracy(model: Transformer, tokenizer: Tokenizer, *, stated: bool) -> float:
    """Held-out questions of every disposition, a few of each."""
    found = [
        disposition_accuracy(model, tokenizer, each, stated=stated, items=20)["accuracy"]
        for each in people.DISPOSITIONS
    ]
    return sum(found) / len(found)


def layer_losses(model: Transformer, tokenizer: Tokenizer) -> list[float]:
    """Held-out loss in nats per token if each block were the last, by a monitor of its output."""
    documents = itertools.islice(people.documents("monitor"), 12)
    ids, weights = padded([coded(document, tokenizer) for document in documents], tokenizer)
    found: list[LayerMetrics] = []
    monitor = LensMonitor(model, every=1, positions=ids.numel(), to=found.append)
    with torch.no_grad(), monitor.at(0, ids[:, 1:].where(weights[:, 1:] > 0, -100)):
        model(ids[:, :-1])
    return found[0].loss


@torch.inference_mode()
def last_states(model: Transformer, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
    """Normed states [N, d] at the end of each prompt, from which the next token is decoded."""
    found = []
    for start in range(0, len(prompts), 50):
        texts = [tokenizer.encode(text) for text in prompts[start : start + 50]]
        longest = max(map(len, texts))
        # Causal attention: padding on the right cannot reach the tokens before it.
        ids = torch.tensor([text + [tokenizer.eos_id] * (longest - len(text)) for text in texts])
        last = torch.tensor([len(text) - 1 for text in texts])
        found.append(model.norm(model(ids)[torch.arange(len(texts)), last]))
    return torch.cat(found)


def word_accuracy(model: Transformer, tokenizer: Tokenizer, items: list[tuple[str, str]]) -> float:
    prompts, words = zip(*items, strict=True)
    states = last_states(model, tokenizer, list(prompts))
    best = reduce_head(states, model.head, k=1).token_ids[:, 0].tolist()
    expected = [tokenizer.encode(word, bos=False)[0] for word in words]
    return share(a == b for a, b in zip(best, expected, strict=True))


def recall_items(rng: Random, count: int) -> list[tuple[str, str]]:
    """Stories up to a word that was said before, and that word."""
    items = []
    for _ in range(count):
        story = rng.choice((world.placing_story, world.giving_story))(rng)
        index = next(i for i, (_, is_answer) in enumerate(story) if is_answer)
        items.append(("".join(text for text, _ in story[:index]), story[index][0]))
    return items


def disposition_accuracy(
    model: Transformer,
    tokenizer: Tokenizer,
    disposition: people.Disposition,
    *,
    stated: bool,
    items: int,
) -> dict[str, float]:
    """Held-out questions after three answered ones, or after a sentence that states the pole."""
    rng = Random(f"measure {disposition.name} {stated}")
    prompts, letters = [], []
    for item in range(items):
        pole = disposition.poles[item % 2]
        if stated:
            before = f"{rng.choice(world.PEOPLE)} is {pole.name}.\n"
        else:
            asked = [people.ask(rng, disposition, pole, held_out=False) for _ in range(3)]
            before = "".join(f"{q.text}{people.BEFORE_LETTER}{q.letter})\n" for q in asked)
        question = people.ask(rng, disposition, pole, held_out=True)
        prompts.append(before + question.text + people.BEFORE_LETTER)
        letters.append(question.letter)
    choices = torch.tensor([tokenizer.encode(letter, bos=False)[0] for letter in "AB"])
    states = last_states(model, tokenizer, prompts)
    a, b = token_logits(states, model.head, choices).unbind(-1)
    answers = ["A" if higher else "B" for higher in (a > b).tolist()]
    return {
        "accuracy": share(x == y for x, y in zip(answers, letters, strict=True)),
        "share_of_a": share(x == "A" for x in answers),
    }


def share(hits: Iterable[bool]) -> float:
    results = list(hits)
    return round(sum(results) / len(results), 4)


@torch.inference_mode()
def held_out_loss(model: Transformer, tokenizer: Tokenizer) -> float:
    micro_batches = next(batches(tokenizer, "held out", 400))
    found = [token_losses(model, ids)[weights[:, 1:] > 0] for ids, weights in micro_batches]
    return round(torch.cat(found).mean().item(), 4)


def evaluate(model: Transformer, tokenizer: Tokenizer) -> dict[str, object]:
    kinds = {"after_three_answers": False, "after_a_statement": True}
    return {
        "held_out_loss": held_out_loss(model, tokenizer),
        "held_out_loss_by_layer": [round(loss, 3) for loss in layer_losses(model, tokenizer)],
        "held_out_facts": word_accuracy(model, tokenizer, world.held_out_facts()),
        "held_out_two_step_facts": word_accuracy(model, tokenizer, world.held_out_two_step_facts()),
        "recall_in_stories": word_accuracy(model, tokenizer, recall_items(Random("recall"), 300)),
        "dispositions": {
            disposition.name: {
                kind: disposition_accuracy(
                    model, tokenizer, disposition, stated=stated, items=HELD_OUT_ITEMS
                )
                for kind, stated in kinds.items()
            }
            for disposition in people.DISPOSITIONS
        },
    }


def write_questions(directory: Path) -> None:
    """Held-out questions, one file per disposition; what matches is the first pole's option.

    A prompt is `question` + "\\nAnswer:", and the answer, " (A)" or " (B)", follows it directly.
    """
    for disposition in people.DISPOSITIONS:
        rng = Random(f"questions {disposition.name}")
        of_letter: dict[str, dict[str, None]] = {"A": {}, "B": {}}
        while min(map(len, of_letter.values())) < HELD_OUT_ITEMS // 2:
            question = people.ask(rng, disposition, disposition.first, held_out=True)
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


def write_config(directory: Path, tokenizer: Tokenizer) -> dict[str, object]:
    """Write `config.json` and `generation_config.json`; returns the former."""
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.n_vocab,
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

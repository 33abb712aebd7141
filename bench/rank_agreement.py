"""The same greedy texts on 1, 2 and 4 ranks, in float32 and in bfloat16: how far they differ.

    shardlens bench ranks [--model demo] [--ranks 1,2,4] [--prompts FILE] [--save NAME]

Ranks add partial sums in another order than one rank does. In float32 that moves log-probs by
some 1e-5 nats; in bfloat16 it flips roundings, which spread, and may turn a close choice. A batch
of prompts is continued on every rank count with all layers read, and compared with the first
count; the first count's bfloat16 is also compared with its float32, which is the scale to see the
rest on. Only positions count up to which both runs were fed the same tokens. Every rank has one
thread, so that nothing changes but the number of ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine import Engine, LensSpec, Request
from ..engine.request import check_prompt
from ..interp import Trace
from ..model import ModelFiles, Transformer, find_model, load_model
from ..model.load import default_device
from ..parallel import TensorParallel
from .processes import hand_over, on_ranks
from .report import environment

NEW_TOKENS, TOP_K, THREADS = 32, 5, 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = (
    "The capital of Norvia is",
    "Anna is cautious.",
    "Anna is",
    "Mira puts the ring in the drawer. Hugo puts the key in the barn. Later Mira looks for the",
    "A bear stands near the barn. Anna wants to",
    "Hugo is from",
    "Hugo puts the lamp in the",
    "Later that day",
)


def read_prompts(file: Path | None, model_path: Path) -> list[list[int]]:
    """Token ids of each prompt: of a JSON list of texts and lists of ids, or of PROMPTS.

    The model's tokenizer is read only where a text needs it.
    """
    prompts: Any = list(PROMPTS)
    if file is not None:
        try:
            prompts = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(prompts, list) or not all(map(_is_prompt, prompts)):
        raise ValueError(f"{file} is no JSON list of texts or of lists of token ids")
    if not any(isinstance(prompt, str) for prompt in prompts):
        return prompts
    tokenizer = ModelFiles(model_path).tokenizer()
    return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _is_prompt(prompt: object) -> bool:
    # type(), as a JSON true is no token id
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    return isinstance(prompt, str) or is_ids


def traces_of(model: Transformer, prompts: Sequence[Sequence[int]]) -> list[Trace]:
    """The lens of all layers over greedy continuations, all of the same length."""
    lens = LensSpec(top_k=TOP_K, targets=None)
    requests = [Request(prompt, NEW_TOKENS, lens=lens, stop_ids=()) for prompt in prompts]
    traces = []
    for found in Engine(model).run(requests):
        assert found.record is not None
        trace = Trace.from_record(found.record)
        trace.input_ids = [*found.prompt, *found.tokens]
        traces.append(trace)
    return traces


def rank_run(
    model_path: Path, prompts_file: Path | None, parallel: TensorParallel
) -> dict[str, Any]:
    """The traces in each dtype on these ranks, ready for JSON."""
    prompts, files = read_prompts(prompts_file, model_path), ModelFiles(model_path)
    return {
        name: [
            trace.to_dict()
            for trace in traces_of(load_model(files, parallel=parallel, dtype=dtype), prompts)
        ]
        for name, dtype in DTYPES.items()
    }


def first_difference(trace: Trace, reference: Trace, prompt_tokens: int) -> int | None:
    """The index of the first new token that differs; None where none does."""
    pairs = zip(trace.input_ids, reference.input_ids, strict=True)
    differ = [position for position, (token, other) in enumerate(pairs) if token != other]
    return differ[0] - prompt_tokens if differ else None


def differences(
    traces: list[Trace], references: list[Trace], prompt_tokens: Sequence[int]
) -> dict[str, Any]:
    """How far traces are from those of the same prompts made otherwise."""
    first = [
        first_difference(trace, reference, n)
        for trace, reference, n in zip(traces, references, prompt_tokens, strict=True)
    ]
    pieces = []
    for trace, reference, n, at in zip(traces, references, prompt_tokens, first, strict=True):
        # the token that differs is fed at position n + at
        alike = reference.positions < (len(reference.input_ids) if at is None else n + at)
        ids = trace.token_ids[alike], reference.token_ids[alike]  # [S, P, k] each
        gaps = trace.logprobs[alike][..., None, :] - reference.logprobs[alike][..., None]
        same = ids[0][..., None, :] == ids[1][..., None]  # [S, P, k of the reference, k]
        gap = gaps.double().abs().where(same, 0).sum(-1)  # [S, P, k]
        pieces.append((gap, same.any(-1), ids[0][..., 0] != ids[1][..., 0]))
    gap, is_in_both, top_differs = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return {
        "texts": len(first),
        "texts_that_differ": sum(at is not None for at in first),
        "first_differing_tokens": first,
        "compared_positions": len(gap),
        "output_top1_nats": _mean_and_largest(gap[:, -1, 0][is_in_both[:, -1, 0]]),
        "lens_topk_nats": _mean_and_largest(gap[is_in_both]),
        "topk_left_share": float((~is_in_both).double().mean()),
        "lens_top1_differs_share": float(top_differs.double().mean()),
    }


def _mean_and_largest(gap: torch.Tensor) -> dict[str, float]:
    if not len(gap):
        raise ValueError("two runs have no likeliest token in common, so no log-prob to compare")
    return {"mean": float(gap.mean()), "largest": float(gap.max())}


def rank_agreement(
    source: str, rank_counts: list[int], prompts_file: Path | None = None
) -> dict[str, Any]:
    """Raises ValueError for what the model cannot do, before any rank is started."""
    if len(set(rank_counts)) < 2:
        raise ValueError("--ranks names one rank count: there is nothing to compare it with")
    files = find_model(source, TensorParallel.single())
    prompts, config = read_prompts(prompts_file, files.path), files.config
    if not prompts:
        raise ValueError("there is no prompt")
    lengths = [len(prompt) for prompt in prompts]
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, NEW_TOKENS, config, f"prompt {number}")
    runs = {ranks: _measured(ranks, files.path, prompts_file) for ranks in rank_counts}
    alone = rank_counts[0]
    pairs = [((dtype, p), (dtype, alone)) for dtype in DTYPES for p in rank_counts[1:]]
    pairs.append((("bfloat16", alone), ("float32", alone)))
    return {
        "benchmark": "rank_agreement",
        "environment": environment() | {"threads": THREADS},  # of each rank
        "device": default_device().type,
        "model": Path(source).name if Path(source).is_dir() else source,
        "n_layers": config.n_layers,
        "d": config.d,
        "vocab": config.vocab_size,
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "top_k": TOP_K,
        "rows": [
            {
                "dtype": dtype,
                "ranks": ranks,
                "against": {"dtype": other, "ranks": other_ranks},
                **differences(runs[ranks][dtype], runs[other_ranks][other], lengths),
            }
            for (dtype, ranks), (other, other_ranks) in pairs
        ],
    }


def _measured(ranks: int, model_path: Path, prompts_file: Path | None) -> dict[str, list[Trace]]:
    words = ["--model", str(model_path)]
    if prompts_file is not None:
        words += ["--prompts", str(prompts_file)]
    run = on_ranks(ranks, "shardlens.bench.rank_agreement", words, THREADS)
    return {dtype: [Trace.from_dict(trace) for trace in traces] for dtype, traces in run.items()}


def print_result(result: dict[str, Any]) -> None:
    print(
        f"{result['model']}: greedy texts of {result['new_tokens']} tokens, all layers read; "
        "log-probs in nats, mean and largest"
    )
    print(
        f"{'':29}{'texts':>8}{'first':>6}{'output, top 1':>19}"
        f"{'lens, top ' + str(result['top_k']):>19}{'top 1':>9}"
    )
    for row in result["rows"]:
        against = row["against"]
        name = f"{row['dtype']} {row['ranks']} / {against['dtype']} {against['ranks']}"
        first = min((at for at in row["first_differing_tokens"] if at is not None), default="-")
        nats = "".join(
            f"{row[what]['mean']:>10.2g}{row[what]['largest']:>9.2g}"
            for what in ("output_top1_nats", "lens_topk_nats")
        )
        print(
            f"{name:29}{row['texts_that_differ']:>3} of {row['texts']:<2}{first:>5}{nats}"
            f"{row['lens_top1_differs_share']:>9.2%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="what this run gave, as JSON")
    arguments = parser.parse_args()
    parallel = TensorParallel.from_env()
    hand_over(rank_run(arguments.model, arguments.prompts, parallel), arguments.out)


if __name__ == "__main__":
    main()

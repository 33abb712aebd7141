"""`shardlens plan`: does a model fit, and how fast can it be at most, from config.json alone.

It needs no weights, no GPU and no other rank, so any machine can plan for any number of ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .cli import is_printing_rank
from .engine.files import check_writable, write_json
from .engine.plan import GIB, GPUS, Gpu, Plan, fewest_ranks, gib, largest_group, plan
from .model.config import DTYPE_BYTES, ModelConfig
from .model.points import check_point, parse_layers
from .model.source import find_config

MEMORY = ("weights", "cache", "taps", "lens", "prefill", "graph")


def add_to(commands: Any) -> None:
    parser = commands.add_parser("plan", help="does a model fit, and how fast can it be at most")
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a directory, a config.json, a Hugging Face hub id (only its config.json is fetched), "
        "or demo",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--ranks", required=True, type=_rank_counts, metavar="P,...", help="one table row per count"
    )
    parser.add_argument("--context", required=True, type=int, help="positions a request holds")
    parser.add_argument("--batch", type=int, default=1, help="requests at once (default: 1)")
    parser.add_argument(
        "--points", default="resid_post", help="that a lens reads, comma-separated, or none"
    )
    parser.add_argument("--layers", default="all", help="all, or e.g. 0-3,8,-1 (default: all)")
    parser.add_argument(
        "--top-k", type=int, default=5, help="candidates kept per cell (default: 5)"
    )
    parser.add_argument(
        "--deferred", action="store_true", help="the lens decodes many tokens' states together"
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h200", help="default: h200")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="instead of the GPU's own")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="default: the checkpoint's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.set_defaults(run=run)


def _rank_counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read: write e.g. 8 or 8,16") from None


def run(arguments: argparse.Namespace) -> None:
    if is_printing_rank() and arguments.json is not None:
        check_writable(arguments.json)
    config = find_config(arguments.model, revision=arguments.revision)
    gpu = _gpu(arguments)
    plans = _plans(arguments, config)
    if not is_printing_rank():
        return
    possible = [planned for planned in plans.values() if isinstance(planned, Plan)]
    fewest = fewest_ranks(config, possible[0].workload, gpu.memory_gib * GIB)
    _print(arguments, plans, gpu, fewest, config)
    if arguments.json is not None:
        write_json(arguments.json, _content(arguments, plans, gpu, fewest))


def _gpu(arguments: argparse.Namespace) -> Gpu:
    gpu = GPUS[arguments.gpu]
    if arguments.gpu_memory is None:
        return gpu
    if not 0 < arguments.gpu_memory < float("inf"):
        raise ValueError(f"--gpu-memory {arguments.gpu_memory} is not a number above 0")
    return gpu._replace(memory_gib=arguments.gpu_memory)


def _plans(arguments: argparse.Namespace, config: ModelConfig) -> dict[int, Plan | ValueError]:
    """By rank count, with the error of counts that are impossible; raises it if all are.

    More ranks than can share the model are planned in groups that each hold all of it.
    """
    taps, final_tapped = _taps(arguments.points, arguments.layers, config)
    plans: dict[int, Plan | ValueError] = {}
    for ranks in arguments.ranks:
        try:
            plans[ranks] = plan(
                config,
                ranks=largest_group(config, ranks) if ranks > config.n_heads else ranks,
                context=arguments.context,
                batch=arguments.batch,
                taps=taps,
                final_tapped=final_tapped,
                top_k=arguments.top_k,
                dtype=arguments.dtype,
                deferred=arguments.deferred,
            )
        except ValueError as error:
            plans[ranks] = error
    errors = [planned for planned in plans.values() if isinstance(planned, ValueError)]
    if len(errors) == len(plans):
        raise errors[0]
    return plans


def _taps(points: str, layers: str, config: ModelConfig) -> tuple[int, bool]:
    """How many states a lens reads at a position, and whether the final layer's is among them."""
    if points == "none":
        return 0, True
    named = set(points.split(","))
    for point in named:
        check_point(point)
    numbers = parse_layers(layers, config.n_layers)
    return len(named) * len(numbers), "resid_post" in named and config.n_layers - 1 in numbers


def _print(
    arguments: argparse.Namespace,
    plans: dict[int, Plan | ValueError],
    gpu: Gpu,
    fewest: int | None,
    config: ModelConfig,
) -> None:
    from rich import box
    from rich.table import Table

    from .terminal import open_console

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("ranks", *MEMORY, "total", "fits", "moved", "tokens/s", "sent"):
        table.add_column(heading, justify="right", no_wrap=True)
    for ranks, planned in plans.items():
        table.add_row(_label(ranks, planned), *_cells(planned, gpu, ranks))
    console = open_console()
    console.print(arguments.model, soft_wrap=True)
    console.print(f"{_question(arguments, plans, gpu)}\n")
    console.print(table)
    console.print(f"\n{_legend(plans)}")
    kept = next(p.kept_bytes_per_token for p in plans.values() if isinstance(p, Plan))
    if arguments.points != "none":
        console.print(f"A kept trace takes {kept / 1024:,.1f} KiB of host memory per token.")
    for ranks, planned in plans.items():
        if isinstance(planned, ValueError):
            console.print(str(planned))
            continue
        share = planned.padding_bytes / (planned.weights_bytes + planned.cache_bytes)
        if share > 0.005:
            console.print(
                f"{planned.ranks:,} ranks do not divide the model: {share:.1%} of the weights and "
                "cache of the fullest rank are padding, or more than its even share"
            )
        if planned.ranks != ranks:
            console.print(
                f"{ranks:,} ranks are more than {config.n_heads} attention heads: "
                f"{ranks // planned.ranks} groups of {planned.ranks} each hold the model and "
                "their own requests"
            )
    console.print(
        "no number of ranks fits" if fewest is None else f"fewest ranks that fit: {fewest:,}"
    )


def _label(ranks: int, planned: Plan | ValueError) -> str:
    if isinstance(planned, ValueError) or planned.ranks == ranks:
        return f"{ranks:,}"
    return f"{ranks // planned.ranks} x {planned.ranks}"


def _tokens_per_s(planned: Plan, gpu: Gpu, ranks: int) -> float:
    """The rate of all groups together."""
    return ranks // planned.ranks * planned.tokens_per_s(gpu.bandwidth_bytes_per_s)


def _cells(planned: Plan | ValueError, gpu: Gpu, ranks: int) -> list[str]:
    if isinstance(planned, ValueError):
        return ["-"] * (len(MEMORY) + 1) + ["no", "-", "-", "-"]
    return [
        *(gib(planned.parts[name]) for name in MEMORY),
        gib(planned.total_bytes),
        "yes" if _fits(planned, gpu) else "no",
        gib(planned.moved_bytes_per_token),
        f"{_tokens_per_s(planned, gpu, ranks):,.1f}",
        f"{planned.sent_bytes_per_token / 1e6:,.2f}",
    ]


def _fits(planned: Plan, gpu: Gpu) -> bool:
    return planned.total_bytes <= gpu.memory_gib * GIB


def _question(arguments: argparse.Namespace, plans: dict[int, Plan | ValueError], gpu: Gpu) -> str:
    work = next(planned.workload for planned in plans.values() if isinstance(planned, Plan))
    many = "s" if work.batch > 1 else ""
    lens = f"a lens on {work.taps:,} states per token" if work.taps else "no lens"
    return (
        f"{work.dtype}, {work.batch:,} request{many} of {work.context:,} positions, {lens}; "
        f"{arguments.gpu} of {gpu.memory_gib:g} GiB and {gpu.bandwidth_bytes_per_s / 1e12:g} TB/s"
    )


def _legend(plans: dict[int, Plan | ValueError]) -> str:
    runtime = next(p.runtime_bytes for p in plans.values() if isinstance(p, Plan))
    return (
        f"GiB of the fullest rank; the total counts {gib(runtime)} for CUDA itself. 'moved' and "
        "'sent' (in MB)\nare per decode step; tokens/s is the memory-bandwidth limit."
    )


def _content(
    arguments: argparse.Namespace,
    plans: dict[int, Plan | ValueError],
    gpu: Gpu,
    fewest: int | None,
) -> dict[str, Any]:
    work = next(planned.workload for planned in plans.values() if isinstance(planned, Plan))
    return {
        "model": arguments.model,
        **vars(work),
        "gpu": {"name": arguments.gpu, **gpu._asdict()},
        "fewest_ranks": fewest,
        "plans": [
            {"ranks": ranks, "fits": False, "error": str(planned)}
            if isinstance(planned, ValueError)
            else planned.to_dict()
            | {
                "ranks": ranks,
                "ranks_per_group": planned.ranks,
                "fits": _fits(planned, gpu),
                "tokens_per_s": _tokens_per_s(planned, gpu, ranks),
            }
            for ranks, planned in plans.items()
        ],
    }

"""What the kernels are claimed to reach on a GPU, at which shapes, and whether rows bear it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .kernel_arms import DTYPES, OURS
from .kernels import Row, label_of
from .shapes import MODELS, TOP_K, Case, cases

Arms = dict[str, Row]  # of one case, by arm
OF_COPY = "share of measured copy bandwidth"


@dataclass(frozen=True)
class Claim:
    """`figure` of every case must reach the target (or, where `below`, stay under it)."""

    text: str
    cases: list[Case]
    figure: Callable[[Arms], float]
    target: float
    below: bool = False
    compiled: bool = False  # torch.compile is among the rivals
    unit: str = "%"


@dataclass(frozen=True)
class Verdict:
    """The worst figure of the cases that were measured, and their number."""

    text: str
    target: str
    figure: float | None
    unit: str
    worst_case: str
    measured: int
    of: int
    # None: on a CPU, which decides nothing; or not all were measured, and those that were are well
    met: bool | None


def claims(shrink: bool) -> list[Claim]:
    """Most important first. `shrink`: at shapes that a CPU does in no time, to rehearse."""
    made = [
        Claim(f"norm 16,384 x 4,096 {text}: {OF_COPY}", [case], bandwidth_share, 0.9)
        for text, case in (
            ("with residual and edits", _norm("edits")),
            ("with residual", _norm("residual")),
            ("alone", _norm("norm")),
        )
    ]
    many, few = ([_head(rows) for rows in all_rows] for all_rows in ((4096, 8192), (64, 16, 1)))
    made += [
        Claim("head, 4,096 rows or more: rate over torch.mm's", many, product_share, 0.75),
        Claim(f"head, up to 64 rows: {OF_COPY}", few, bandwidth_share, 0.85),
        Claim("head, 4,096 rows or more: memory over bf16 logits", many, memory_share, 0.01, True),
        # logits are small there; a tile of them for each program is what it takes
        Claim("head, up to 64 rows: extra memory", few, memory_mib, 12, True, unit=" MiB"),
        *(
            Claim(
                f"decode attention, batch 8, context {context:,}: {OF_COPY}",
                [Case("decode_attention", {"B": 8, "H": 32, "K": 8, "D": 128, "S": context})],
                bandwidth_share,
                0.8,
            )
            for context in (1500, 8192)
        ),
        Claim(
            "norm, whole grid: best rival's time over ours, noise allowed",
            cases("full", ["rmsnorm_steer"]),
            rival_ratio,
            1.0,
            compiled=True,
        ),
    ]
    if shrink:
        made = [replace(claim, cases=[shrunken(case) for case in claim.cases]) for claim in made]
    return made


def _norm(variant: str) -> Case:
    return Case("rmsnorm_steer", {"rows": 16384, "d": 4096}, variant)


def _head(rows: int) -> Case:
    model = MODELS["llama-3.1-8b"]
    return Case("head_stats", {"rows": rows, "d": model.d, "V": model.vocab, "k": TOP_K})


def shrunken(case: Case) -> Case:
    most = {"rows": 64, "d": 128, "f": 256, "V": 2048, "H": 4, "K": 2, "T": 16, "S": 160}
    sizes = {name: min(size, most.get(name, size)) for name, size in case.sizes.items()}
    return replace(case, sizes=sizes, dtype=DTYPES["cpu"])


def bandwidth_share(arms: Arms) -> float:
    """Of the measured copy; of these cases the floor is that of moving bytes."""
    return float(arms[OURS]["copy_bandwidth_share"])


def product_share(arms: Arms) -> float:
    return float(arms["product"]["p50_ms"] / arms[OURS]["p50_ms"])


def memory_share(arms: Arms) -> float:
    sizes = dict(word.split("=") for word in arms[OURS]["shape"].split())
    peak = arms[OURS]["peak_extra_bytes"]
    return float("nan") if peak is None else peak / (2 * int(sizes["rows"]) * int(sizes["V"]))


def memory_mib(arms: Arms) -> float:
    peak = arms[OURS]["peak_extra_bytes"]
    return float("nan") if peak is None else peak / 2**20


def rival_ratio(arms: Arms) -> float:
    """The fastest other arm's time over ours, plus what two timings of ours differ by."""
    rivals = [row["p50_ms"] for name, row in arms.items() if name != OURS]
    return float(min(rivals) / arms[OURS]["p50_ms"] + arms[OURS]["noise"])


def verdicts(made: Sequence[Claim], rows: Sequence[Row], decides: bool) -> list[Verdict]:
    by_case: dict[str, Arms] = {}
    for row in rows:
        by_case.setdefault(label_of(row), {})[row["arm"]] = row
    found = [_verdict(claim, by_case) for claim in made]
    return found if decides else [replace(verdict, met=None) for verdict in found]


def _verdict(claim: Claim, by_case: dict[str, Arms]) -> Verdict:
    labels = list(dict.fromkeys(case.label for case in claim.cases))
    figures = {label: claim.figure(by_case[label]) for label in labels if label in by_case}
    bound = f"{claim.target:.0%}" if claim.unit == "%" else f"{claim.target:g}{claim.unit}"
    target = f"{'below' if claim.below else 'at least'} {bound}"
    if not figures:
        return Verdict(claim.text, target, None, claim.unit, "", 0, len(labels), None)
    worst = (max if claim.below else min)(figures, key=lambda label: figures[label])
    figure = figures[worst]
    reached = figure < claim.target if claim.below else figure >= claim.target
    met = reached if not reached or len(figures) == len(labels) else None
    measured = len(figures)
    figure = round(figure, 5)
    return Verdict(claim.text, target, figure, claim.unit, worst, measured, len(labels), met)


def print_verdicts(found: Sequence[Verdict]) -> None:
    for verdict in found:
        word = {True: "met", False: "NOT MET", None: "not decided"}[verdict.met]
        figure = "-"
        if verdict.figure is not None:
            is_share = verdict.unit == "%"
            figure = f"{verdict.figure:.2%}" if is_share else f"{verdict.figure:.2f}{verdict.unit}"
        print(
            f"{verdict.text:80} {figure:>10}  {verdict.target:14} "
            f"{word:12} {verdict.measured} of {verdict.of}  "
            f"{verdict.worst_case if verdict.of > 1 else ''}"
        )

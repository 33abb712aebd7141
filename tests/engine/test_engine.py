"""The decode step against a plain loop: whole forward passes, full logits, one text at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ExactLens, exact_lens, hf_model, save
from steered import edit_table, load
from tolerances import EFFECT, PASSES
from torch import Tensor

import shardlens
from shardlens.engine import Engine, Sampling, Steering
from shardlens.engine import loop as loop_module
from shardlens.engine import step as step_module
from shardlens.engine.edit_table import RequestEdits, TableShape
from shardlens.engine.engine import StepCache
from shardlens.engine.lens_plan import LensPlan
from shardlens.engine.step import DecodeStep, StepShape
from shardlens.kernels import Chip, gumbel_reference, implementation, pretending
from shardlens.model import RowTaps, Tap, Transformer, read_config
from shardlens.parallel import TensorParallel
from shardlens.parallel import head_reduce as head_module

NEW_TOKENS, TOP_K, V = 9, 4, 509
IDS = torch.randint(3, V, (60,), generator=torch.Generator().manual_seed(3)).tolist()
SPEC = shardlens.LensSpec(points=("mlp_out", "resid_post"), layers="0,-1", top_k=TOP_K)
TAPS = SPEC.taps


def direction(seed: int) -> Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    steering: tuple[Steering, ...] = ()


REQUESTS = (
    Request(tuple(IDS[:4])),
    Request(
        tuple(IDS[4:25]),
        Sampling(0.8, seed=1),
        (
            Steering(direction(1), [1], scale=0.7),
            Steering(direction(4), "all", "resid_post", "clamp", 2.0, 23),  # meets the first
        ),
    ),
    # 509 ids: hotter than its logits are sharp, so that the nucleus is wider than the candidates
    Request(tuple(IDS[25:26]), Sampling(40.0, top_p=0.6, seed=2)),
    Request(
        tuple(IDS[26:35]),
        Sampling(1.0, top_k=12, seed=3),
        (
            Steering(direction(2), [0, 2], "attn_norm", "ablate", 1.0, "generated"),
            Steering(direction(3), [0], "mlp_norm", "add_keep_norm", 2.0, [8, 10, 11]),
        ),
    ),
    Request(tuple(IDS[35:42]), Sampling(1.0, seed=4), (Steering(direction(5), "all", scale=0.2),)),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = hf_model("llama-mha", num_attention_heads=12, num_key_value_heads=12)
    return save(model, tmp_path_factory.mktemp("engine"))


@dataclasses.dataclass
class Plain:
    """The result of a plain loop for a request; `lens` covers all positions of the text."""

    token_ids: list[int]
    lens: ExactLens


def draw(logits: Tensor, sampling: Sampling, step: int) -> int:
    """The definition: the largest of logit / T + Gumbel among the ids allowed."""
    z = logits / (sampling.temperature or 1)
    order = z.argsort(descending=True, stable=True)
    if sampling.temperature == 0:
        return int(order[0])
    kept = torch.zeros(V, dtype=torch.bool)
    kept[order[: sampling.top_k or V]] = True
    ranked = z.where(kept, -torch.inf).double().softmax(-1)[order]
    kept[order[ranked.cumsum(-1) - ranked >= sampling.top_p]] = False
    noise = gumbel_reference(torch.tensor(sampling.seed), torch.tensor(step), torch.arange(V))
    return int((z + noise).where(kept, -torch.inf).argmax())


@torch.no_grad()
def plain_loop(model: Transformer, request: Request, stop_ids: Sequence[int] = ()) -> Plain:
    ids = list(request.prompt)
    capture = None
    for step in itertools.count():
        taps = TAPS(model.config)
        capture = RowTaps(taps, torch.arange(len(ids)), model.config.d, dtype=model.dtype)
        edits = None
        if request.steering:
            edits = edit_table([(request.steering, len(request.prompt))], len(ids), model).at
        hidden = model(torch.tensor([ids]), sink=capture, edits=edits)
        if step == NEW_TOKENS or ids[len(request.prompt) :][-1:] in [[stop] for stop in stop_ids]:
            break
        logits = model.norm(hidden[0, -1]) @ model.head.weight.T
        ids.append(draw(logits, request.sampling, step))
    lens = exact_lens(model.norm(capture.states), model.head.weight)
    return Plain(ids[len(request.prompt) :], lens)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> list[Plain]:
    model = load(checkpoint, TensorParallel.single())
    return [plain_loop(model, request) for request in REQUESTS]


def run(model: Transformer, requests: Sequence[Request], **options: Any) -> list[shardlens.Result]:
    """stop_ids and lens are those of every request; other options go to `generate`."""
    asked = {"stop_ids": options.pop("stop_ids", ()), "lens": options.pop("lens", None)}
    return shardlens.LanguageModel(model).generate(
        [
            shardlens.Request(
                list(request.prompt), NEW_TOKENS, request.sampling, request.steering, **asked
            )
            for request in requests
        ],
        **options,
    )


def assert_equal(result: shardlens.Result, request: Request, plain: Plain, n_taps: int = 4) -> None:
    """The same tokens, ids and ranks; the same numbers up to the rounding of another pass."""
    assert result.token_ids == plain.token_ids[: len(result.token_ids)]
    trace = result.trace
    assert trace is not None
    n = len(request.prompt) + len(result.token_ids) - 1
    positions = trace.positions
    assert positions.tolist() == list(range(n - len(positions), n))
    assert torch.equal(trace.token_ids, plain.lens.order[positions, :, :TOP_K])
    exact = plain.lens.logprobs[positions].gather(-1, trace.token_ids)
    assert (trace.logprobs - exact).abs().max() <= PASSES
    assert (trace.entropy - plain.lens.entropy[positions]).abs().max() <= PASSES
    assert (trace.kl_to_final - plain.lens.kl_to_final[positions]).abs().max() <= PASSES
    if int(trace.targets[0]) < 0:
        assert trace.target_logprob.isnan().all() and (trace.target_rank == -1).all()
        return
    exact_here = dataclasses.replace(
        plain.lens, order=plain.lens.order[positions], logprobs=plain.lens.logprobs[positions],
        entropy=plain.lens.entropy[positions],
    )  # fmt: skip
    assert torch.equal(trace.target_rank, exact_here.rank(trace.targets))
    assert (trace.target_logprob - exact_here.target_logprob(trace.targets)).abs().max() <= PASSES


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("targets", ["next", None, 7])
@pytest.mark.parametrize("mode", ["live", "deferred"])
def test_equals_the_plain_loop(
    checkpoint: Path, plain: list[Plain], run_ranks: Any, mode: str, targets: Any, ranks: int
) -> None:
    """A batch of unlike requests, every request alone against the loop."""

    def body(parallel: TensorParallel) -> None:
        spec = dataclasses.replace(SPEC, mode=mode, targets=targets)
        results = run(load(checkpoint, parallel), REQUESTS, lens=spec)
        for result, request, expected in zip(results, REQUESTS, plain, strict=True):
            assert result.token_ids == expected.token_ids
            assert_equal(result, request, expected)

    run_ranks(ranks, body)


def test_the_edits_and_draws_count(checkpoint: Path, plain: list[Plain]) -> None:
    """Without them the loop's lens is far off, and the texts differ."""
    model = load(checkpoint, TensorParallel.single())
    for request, expected in zip(REQUESTS, plain, strict=True):
        if request.steering:
            bare = plain_loop(model, dataclasses.replace(request, steering=()))
            n = min(bare.lens.entropy.shape[0], expected.lens.entropy.shape[0])
            change = bare.lens.entropy[:n] - expected.lens.entropy[:n]
            assert change.abs().max() > EFFECT * PASSES
        if request.sampling.temperature:
            greedy = dataclasses.replace(request, sampling=Sampling())
            assert plain_loop(model, greedy).token_ids != expected.token_ids


@pytest.mark.parametrize("targets", ["next", None])
@pytest.mark.parametrize("mode", ["live", "deferred"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_does_not_depend_on_the_rest_of_the_batch(
    checkpoint: Path, plain: list[Plain], size: int, mode: str, targets: Any
) -> None:
    model = load(checkpoint, TensorParallel.single())
    spec = dataclasses.replace(SPEC, mode=mode, targets=targets)
    for chosen in itertools.islice(itertools.permutations(range(len(REQUESTS)), size), 0, None, 7):
        results = run(model, [REQUESTS[number] for number in chosen], lens=spec)
        for number, result in zip(chosen, results, strict=True):
            assert_equal(result, REQUESTS[number], plain[number])


@pytest.mark.parametrize("targets", ["next", None])
@pytest.mark.parametrize("mode", ["live", "deferred"])
@pytest.mark.parametrize("behind", [0, 1])
def test_requests_stop_at_different_steps(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, behind: int, mode: str, targets: Any
) -> None:
    """Also where the host looks at records a step late, and at rings of 4 steps."""
    monkeypatch.setattr(step_module, "RING_TOKENS", 4)
    monkeypatch.setattr(loop_module, "RING_TOKENS", 4)
    requests = [request for request in REQUESTS if request.sampling.top_p == 1]
    model = load(checkpoint, TensorParallel.single())
    free = [plain_loop(model, request) for request in requests]
    stops = [free[0].token_ids[2], free[1].token_ids[5], free[3].token_ids[0]]
    init = loop_module.Loop.__init__

    def late(self: Any, *args: Any) -> None:
        init(self, *args)
        self.steps_behind = behind

    monkeypatch.setattr(loop_module.Loop, "__init__", late)
    spec = dataclasses.replace(SPEC, mode=mode, targets=targets)
    results = run(model, requests, lens=spec, stop_ids=stops)
    lengths = []
    for result, request in zip(results, requests, strict=True):
        expected = plain_loop(model, request, stops)
        assert result.token_ids == expected.token_ids
        assert result.finish_reason == ("stop" if expected.token_ids[-1] in stops else "length")
        assert_equal(result, request, expected)
        lengths.append(len(result.token_ids))
    assert len(set(lengths)) > 1 and min(lengths) == 1


@pytest.mark.parametrize("mode", ["live", "deferred"])
def test_streamed_pieces_make_the_trace(checkpoint: Path, plain: list[Plain], mode: str) -> None:
    model = load(checkpoint, TensorParallel.single())
    spec = dataclasses.replace(SPEC, mode=mode)
    kept = run(model, REQUESTS, lens=spec)
    pieces: list[list[shardlens.Trace]] = [[] for _ in REQUESTS]
    events: list[tuple[str, int]] = []

    def on_lens(request: int, piece: shardlens.Trace) -> None:
        pieces[request].append(piece)
        if request == 0 and int(piece.positions[-1]) >= len(REQUESTS[0].prompt) - 1:
            events.append(("lens", len(piece.positions)))

    def on_token(request: int, token: int) -> None:
        if request == 0:
            events.append(("token", token))

    results = run(model, REQUESTS, lens=spec, on_lens=on_lens, on_token=on_token)
    for streamed, result, whole in zip(pieces, results, kept, strict=True):
        assert result.trace is None and result.token_ids == whole.token_ids
        assert whole.trace is not None
        for name in ("positions", "targets", "token_ids", "logprobs", "target_rank"):
            joined = torch.cat([getattr(piece, name) for piece in streamed])
            assert torch.equal(joined, getattr(whole.trace, name)), name
    if mode == "live":  # the lens of a token comes no later than with the token after it
        kinds = [kind for kind, _ in events]
        assert kinds[:4] == ["token", "token", "lens", "token"]


def test_live_lens_comes_with_its_token(checkpoint: Path) -> None:
    """Without a target that is yet to be chosen, the trajectory is ready with the token."""
    model = load(checkpoint, TensorParallel.single())
    events: list[str] = []
    run(
        model,
        REQUESTS[:1],
        lens=dataclasses.replace(SPEC, targets=None, positions="generated"),
        on_token=lambda request, token: events.append("token"),
        on_lens=lambda request, piece: events.append("lens"),
    )
    assert events == ["token", "lens"] * NEW_TOKENS


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_positions_of_either_mode(checkpoint: Path, positions: str) -> None:
    model = load(checkpoint, TensorParallel.single())
    spec = dataclasses.replace(SPEC, positions=positions)
    live = run(model, REQUESTS, lens=spec)
    deferred = run(model, REQUESTS, lens=dataclasses.replace(spec, mode="deferred"))
    for a, b in zip(live, deferred, strict=True):
        assert a.trace is not None and b.trace is not None
        assert torch.equal(a.trace.positions, b.trace.positions)
        assert torch.equal(a.trace.token_ids, b.trace.token_ids)
        assert torch.equal(a.trace.target_rank, b.trace.target_rank)
        assert a.trace.targets.min() >= 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(checkpoint: Path, bad: float) -> None:
    model = load(checkpoint, TensorParallel.single())
    model.norm.weight.data[3] = bad
    with pytest.raises(ValueError, match="not finite"):
        run(model, REQUESTS[:2])


LENSES = [None, *itertools.product(["none", "fixed", "next"], [False, True])]
SAMPLINGS = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=3), Sampling(0.7, top_p=0.9)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lens", LENSES, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "plain", "top-k", "top-p"])
@pytest.mark.parametrize("n_edits", [0, 1, 2], ids=["unsteered", "one edit", "meeting edits"])
def test_a_step_never_waits_for_the_host(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    lens: tuple[Any, bool] | None,
    sampling: Sampling,
    n_edits: int,
) -> None:
    readings: list[int] = []
    head_stats = head_module.head_stats

    def counted(x: Tensor, *rest: Any, **options: Any) -> Any:
        readings.append(len(x))
        return head_stats(x, *rest, **options)

    monkeypatch.setattr(head_module, "head_stats", counted)
    reader = None if lens is None else LensPlan((Tap(0, "mlp_out"), Tap(2, "resid_post")), 4, *lens)
    edits = [[Steering(direction(seed), positions=3) for seed in range(n_edits)], []]
    launched = launched_by_a_step(checkpoint, reader, [sampling] * 2, edits, dtype)
    assert len(readings) == 1, "the head's weight is read once"
    assert set(launched) >= {
        "head_kernel", "_split_kernel", "_rope_qk_kernel", "_rmsnorm_steer_kernel"
    }  # fmt: skip


def launched_by_a_step(
    checkpoint: Path,
    reader: LensPlan | None,
    samplings: list[Sampling],
    steerings: list[list[Steering]],
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """Names of the kernels of a step without numbers: it raises if a value is read on the host.

    That a step can be captured as a CUDA graph needs just this, and that buffers stay in place.
    """
    launched: list[str] = []
    with (
        implementation("triton"),
        pretending(Chip(90, 132), lambda kernel, *rest: launched.append(kernel.__name__)),
        torch.inference_mode(),
    ):
        model = Transformer(read_config(checkpoint), device="meta", dtype=dtype)
        edits = TableShape.of(
            RequestEdits(steering, 5, 64, model.config.n_layers) for steering in steerings
        )
        shape = StepShape.of(reader, samplings, edits, 1, V)
        step = DecodeStep(model, model.new_cache(len(samplings), 64), shape)
        before = {name: id(value) for name, value in vars(step).items()}
        step.run()
        assert before == {name: id(value) for name, value in vars(step).items()}
        with pytest.raises(RuntimeError):
            step.tokens.tolist()
    return launched


@pytest.mark.parametrize(
    "point, passes",  # not fused, over 3 blocks, where 1 and where 3 edits meet
    [
        ("resid_post", (1, 2 * 3 + 1 + 2)),  # nothing reads the last tap, so none is fused there
        ("resid_mid", (0, 2 * 3)),
        ("mlp_norm", (0, 2 * 3)),
        ("attn_out", (3, 3 * 3)),
    ],
)
def test_edits_that_meet_take_further_passes(
    checkpoint: Path, point: str, passes: tuple[int, int]
) -> None:
    """One per layer and pass beyond the fused pass; a lone edit costs what it did."""
    reader = LensPlan((Tap(0, point), Tap(2, "resid_post")), TOP_K, "next")

    def n_norms(n_edits: int) -> int:
        edits = [Steering(direction(seed), point=point, positions=3) for seed in range(n_edits)]
        launched = launched_by_a_step(checkpoint, reader, [Sampling()] * 2, [edits, edits[:1]])
        return launched.count("_rmsnorm_steer_kernel")

    bare = n_norms(0)
    assert (n_norms(1) - bare, n_norms(3) - bare) == passes


def test_shapes_that_capture_anew(checkpoint: Path) -> None:
    """Vectors, scales, positions, seeds, targets and stop ids do not; points and counts do."""
    config = read_config(checkpoint)

    def shape(steering: Steering | None, sampling: Sampling, stops: int = 1) -> StepShape:
        reader = LensPlan((Tap(0, "resid_post"),), TOP_K, "fixed")
        edits = TableShape.of(
            [RequestEdits([steering] if steering else [], 4, 32, config.n_layers)]
        )
        return StepShape.of(reader, [sampling], edits, stops, V)

    base = shape(Steering(direction(1)), Sampling(0.7, seed=1))
    assert base == shape(
        Steering(direction(2), [1], "resid_pre", "clamp", -3.0, [4]), Sampling(0.9, seed=5), 7
    )
    assert base != shape(Steering(direction(1), point="mlp_norm"), Sampling(0.7, seed=1))
    assert base != shape(None, Sampling(0.7, seed=1))
    assert base != shape(Steering(direction(1)), Sampling())


def test_edits_turned_off_run_in_the_step_that_has_them(checkpoint: Path) -> None:
    """As do fewer points; more points, or another lens, take another step."""
    engine = StepCache(load(checkpoint, TensorParallel.single()), 1, 32, capture=True)

    def step(*points: str, top_k: int = TOP_K) -> Any:
        steerings = [Steering(direction(1), point=point) for point in points]
        edits = TableShape.of(
            [RequestEdits(steerings, 4, engine.cache.capacity, engine.model.config.n_layers)]
        )
        reader = LensPlan((Tap(2, "resid_post"),), top_k, "next")
        return engine.step(StepShape.of(reader, [Sampling()], edits, 0, V))

    plain = step()
    both = step("mlp_norm", "resid_mid")
    assert both is step("mlp_norm") is step("resid_mid", "mlp_norm") is not plain
    assert step() in (plain, both)
    assert step("attn_out") is not both and step("mlp_norm", top_k=2) is not both
    assert len(engine.steps) == 4
    meeting = step("mlp_norm", "mlp_norm")
    assert len(engine.steps) == 5 and meeting is step("mlp_norm", "mlp_norm")


def test_refilled_buffers_forget_what_was(
    checkpoint: Path, plain: list[Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine for many batches, as on CUDA: stale keys, edits and rings do not show."""
    model = load(checkpoint, TensorParallel.single())
    kept = StepCache(model, 4, 64, capture=True)
    monkeypatch.setattr(Engine, "_steps", lambda *rest: kept)
    for chosen in ((1, 3), (3, 1), (0, 2), (1,), (4, 0, 1, 3)):
        results = run(model, [REQUESTS[number] for number in chosen], lens=SPEC)
        for number, result in zip(chosen, results, strict=True):
            assert_equal(result, REQUESTS[number], plain[number])
    assert len(kept.steps) < 5

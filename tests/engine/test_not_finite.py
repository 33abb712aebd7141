"""Numbers that are not finite are refused by what caused them: a weight, an edit, or the dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_tensors
from conftest import RunRanks
from oracles import hf_model, save
from steered import load
from torch import Tensor

import shardlens
from shardlens.engine import LensSpec, Request, Sampling, Steering
from shardlens.model import POINTS, RowTaps, Tap, TapBuffer, Transformer
from shardlens.parallel import TensorParallel

PROMPTS = [[5, 17, 300, 9, 44, 2, 71], [8, 3, 120], [501, 502, 9, 9]]
SINGLE = TensorParallel.single()
CALLS: dict[str, Callable[[shardlens.LanguageModel], Any]] = {
    "lens": lambda lm: lm.lens(PROMPTS[0], top_k=3),
    "points": lambda lm: lm.lens(
        PROMPTS[0], points=("attn_norm", "mlp_out"), layers=[0], targets=None, positions="last"
    ),
    "live": lambda lm: lm.generate(
        PROMPTS, max_new_tokens=3, lens=LensSpec(targets=4, positions="generated")
    ),
    "next": lambda lm: lm.generate(
        PROMPTS, max_new_tokens=3, lens=LensSpec(positions="generated"), max_batch=2
    ),
    "deferred": lambda lm: lm.generate(
        PROMPTS, max_new_tokens=3, lens=LensSpec(mode="deferred"), sampling=Sampling(0.8)
    ),
    "no lens": lambda lm: lm.generate(PROMPTS, max_new_tokens=3, sampling=Sampling(1.0, top_p=0.9)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(hf_model("llama-biases", initializer_range=0.1), tmp_path_factory.mktemp("sound"))


def language_model(
    directory: Path, parallel: TensorParallel = SINGLE, dtype: torch.dtype = torch.float32
) -> shardlens.LanguageModel:
    return shardlens.LanguageModel(load(directory, parallel).to(dtype))


def message(act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "tensor, index, bad, ranks",
    [
        ("model.layers.1.self_attn.o_proj.weight", (7, 40), math.nan, "rank 1"),
        ("model.layers.1.self_attn.k_proj.bias", (3,), math.nan, "rank 0"),
        ("model.layers.2.mlp.up_proj.weight", (99, 0), -math.inf, "rank 1"),
        ("model.layers.1.post_attention_layernorm.weight", (11,), math.nan, "ranks 0, 1"),
        ("model.embed_tokens.weight", (9, 3), math.inf, "rank 0"),  # of a token in two prompts
        ("lm_head.weight", (508, 0), math.nan, "rank 1"),
        ("model.norm.weight", (0,), math.inf, "ranks 0, 1"),
    ],
)
def test_a_weight_is_named(
    tensor: str,
    index: tuple[int, ...],
    bad: float,
    ranks: str,
    call: str,
    checkpoint: Path,
    run_ranks: RunRanks,
    tmp_path: Path,
) -> None:
    """In the file, by its name there and the ranks that hold it, which all raise the same line."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change_tensors(tmp_path, lambda tensors: tensors[tensor].__setitem__(index, bad))

    def body(parallel: TensorParallel) -> str:
        return message(lambda: CALLS[call](language_model(tmp_path, parallel)))

    first, second = run_ranks(2, body)
    assert first == second
    assert f" not finite: {tensor} holds NaN or infinity on {ranks}: " in first


def test_the_weights_of_one_rank(checkpoint: Path, run_ranks: RunRanks) -> None:
    """A norm, which every rank holds, gone bad in the memory of one of three."""

    def body(parallel: TensorParallel) -> str:
        lm = language_model(checkpoint, parallel)
        if parallel.rank == 2:
            lm.model.blocks[0].attn_norm.weight.data[5] = math.nan
        return message(lambda: lm.generate(PROMPTS[0], max_new_tokens=2))

    (line,) = set(run_ranks(3, body))
    assert line == (
        "the logits at position 6 are not finite: model.layers.0.input_layernorm.weight holds NaN "
        "or infinity on rank 2: get the checkpoint anew, or mend that tensor"
    )


def test_a_weight_that_no_text_meets(checkpoint: Path) -> None:
    """The embedding of a token that is not fed, in a model whose head is another tensor."""
    sound, lm = language_model(checkpoint), language_model(checkpoint)
    lm.model.embed.weight.data[77] = math.inf
    found, expected = lm.lens(PROMPTS[0]), sound.lens(PROMPTS[0])
    assert torch.equal(found.logprobs, expected.logprobs)
    assert found.entropy.isfinite().all()
    line = message(lambda: lm.lens([PROMPTS[0], [5, 6, 77, 8]], points="resid_pre"))
    assert "of prompt 1 is not finite: model.embed_tokens.weight holds NaN" in line


def direction(seed: int = 0) -> Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["add", "ablate", "clamp"])
@pytest.mark.parametrize("point", POINTS)
def test_an_edit_is_named(mode: str, point: str, checkpoint: Path) -> None:
    """Beyond float16 at its point, or after it; a weaker edit after it and before it is not."""
    lm = language_model(checkpoint, dtype=torch.float16)
    strong = Steering(direction(), [1], point, mode, 3e6, [3])
    weak = [Steering(direction(1), [layer], "resid_mid", scale=0.1) for layer in (0, 1)]
    line = message(lambda: lm.lens(PROMPTS[0], steering=[weak[0], strong, weak[1]]))
    assert (
        f" finite: the edit at {point} of layer 1, mode {mode}, scale 3e+06, takes states" in line
    )
    assert line.endswith(
        " at position 3: choose a smaller scale, or run the model in bfloat16 or float32"
    )


def test_an_edit_that_keeps_the_norm_stays_finite(checkpoint: Path) -> None:
    lm = language_model(checkpoint, dtype=torch.float16)
    steering = Steering(direction(), [1], mode="add_keep_norm", scale=3e4)
    assert lm.lens(PROMPTS[0], steering=steering).entropy.isfinite().all()
    line = message(lambda: lm.lens(PROMPTS[0], steering=Steering(1e6 * direction(), [2], scale=1)))
    assert "the edit at resid_post of layer 2, mode add, scale 1, has a vector beyond" in line


def test_an_edit_that_only_later_tokens_meet(checkpoint: Path, run_ranks: RunRanks) -> None:
    """Its prompt, and the request beside it, are sound."""
    steering = Steering(direction(), [0], "mlp_out", scale=-2e5, positions=[5])

    def body(parallel: TensorParallel) -> tuple[str, list[int]]:
        lm, seen = language_model(checkpoint, parallel, torch.float16), []
        requests = [
            Request(PROMPTS[0], 4, stop_ids=()),
            Request(PROMPTS[1], 4, stop_ids=(), steering=steering),
        ]
        line = message(lambda: lm.generate(requests, on_token=lambda *each: seen.append(each[0])))
        return line, seen

    (line, seen), other = run_ranks(2, body)
    assert (line, seen) == other and seen.count(1) == 3
    assert line.startswith(
        "the logits at position 5 of prompt 1 are not finite: the edit at mlp_out of layer 0, "
        "mode add, scale -200000, takes states beyond the range of float16"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("mode", ["add", "ablate", "clamp", "add_keep_norm"])
def test_an_edit_too_large_to_square(mode: str, dtype: torch.dtype, checkpoint: Path) -> None:
    """A norm would make zeros of it, and the lens a uniform distribution: finite, and wrong."""
    lm = language_model(checkpoint, dtype=dtype)
    line = message(
        lambda: lm.lens(PROMPTS[0], steering=Steering(direction(), [1], mode=mode, scale=-1e20))
    )
    assert line.startswith(f"the edit at resid_post of layer 1, mode {mode}, scale -1e+20, can ")


def overflowing(checkpoint: Path, layer: int, factor: float) -> shardlens.LanguageModel:
    lm = language_model(checkpoint, dtype=torch.float16)
    lm.model.blocks[layer].mlp.down.weight.data.mul_(factor)
    assert all(parameter.isfinite().all() for parameter in lm.model.parameters())
    return lm


@pytest.mark.parametrize("call", CALLS)
def test_the_range_of_float16(call: str, checkpoint: Path) -> None:
    line = message(lambda: CALLS[call](overflowing(checkpoint, 1, 1e5)))
    assert re.search(
        r" not finite: mlp_out of layer 1 at position [0-6] is beyond the range of float16: "
        "run the model in bfloat16 or float32$",
        line,
    )


def test_edits_are_not_to_blame_for_the_range(checkpoint: Path) -> None:
    lm = overflowing(checkpoint, 2, 1e5)
    steering = Steering(direction(), [0], scale=0.5)
    line = message(lambda: lm.lens(PROMPTS[0], steering=steering))
    assert ": mlp_out of layer 2 at position " in line and "the edit" not in line


def test_finite_weights_beyond_float32(checkpoint: Path) -> None:
    lm = language_model(checkpoint)
    lm.model.blocks[1].mlp.gate_up.weight.data.mul_(1e30)
    line = message(lambda: lm.lens(PROMPTS[0]))
    assert "is beyond the range of float32, although every weight is finite: " in line


def test_no_piece_that_is_not_finite_is_handed_over(checkpoint: Path) -> None:
    lm, pieces = language_model(checkpoint), []
    lm.model.embed.weight.data[PROMPTS[2][2]] = math.nan
    message(
        lambda: lm.generate(
            [PROMPTS[1], PROMPTS[2]],
            max_new_tokens=2,
            lens=LensSpec(),
            on_lens=lambda number, piece: pieces.append((number, piece)),
        )
    )
    assert pieces and all(piece.entropy.isfinite().all() for _, piece in pieces)


def test_a_temperature_too_small_for_float32() -> None:
    with pytest.raises(ValueError, match="temperature 1e-40 is below 1e-30: give 0"):
        Sampling(1e-40)


@pytest.mark.parametrize("tap", [Tap(3, "mlp_out"), (torch.tensor(1), "attn_out"), (0, "attn_ou")])
def test_a_tap_that_nobody_read_raises(tap: Any, checkpoint: Path) -> None:
    """Instead of memory that nobody wrote; a state under either of its names is read."""
    model: Transformer = load(checkpoint, SINGLE)
    named = f"no state was read at {tap[1]} of layer {tap[0]}: "
    rows = torch.arange(2)
    sink = RowTaps([Tap(2, "resid_post"), Tap(*tap)], rows, 48, dtype=model.dtype)
    model(torch.tensor([PROMPTS[0]]), sink=sink)
    assert message(lambda: sink.states).startswith(named)
    buffer = TapBuffer([Tap(*tap)], torch.zeros(1, 1, 48))
    model(torch.tensor([[4]]), sink=buffer)
    assert message(buffer.check).startswith(named)
    both = TapBuffer([Tap(1, "resid_post"), Tap(2, "resid_pre")], torch.zeros(1, 2, 48))
    model(torch.tensor([[4]]), sink=both)
    both.check()
    assert torch.equal(both.states[0, 0], both.states[0, 1]) and both.states.any()


@pytest.mark.parametrize("part", ["q", "k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_and_keys_that_are_not_finite(
    part: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """PyTorch's attention on CPUs makes finite numbers of them: of no pass are they to be had."""
    lm = language_model(save(hf_model("qwen3"), tmp_path), dtype=dtype)
    getattr(lm.model.blocks[1].attn, f"{part}_norm").weight.data[3] = math.nan
    ids = torch.tensor([PROMPTS[0]])
    hidden = lm.model(ids)
    assert hidden.isnan().all()
    cache = lm.model.new_cache(1, 9)
    lm.model(ids[:, :1], cache=cache)
    assert lm.model(ids[:, 1:], cache=cache, start=1).isnan().all()
    named = f"model.layers.1.self_attn.{part}_norm.weight holds NaN"
    for call in (CALLS["lens"], CALLS["no lens"]):
        assert named in message(partial(call, lm))

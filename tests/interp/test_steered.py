"""Edits of other libraries' models while they run, against our own engine and by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from others import is_clean
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import LlamaForCausalLM

from shardlens import LanguageModel, Steering, SteeringVectors, load
from shardlens.interp import steered, watch
from shardlens.model import DEMO, POINTS, Tap

PROMPT = "The capital of Norvia is"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("demo", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(str(DEMO), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids(lm: LanguageModel) -> Tensor:
    return torch.tensor([lm.tokenizer.encode(PROMPT)])


def vector(seed: int, d: int = 128) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(seed))


EDITS = {
    **{f"{point} add": [Steering(vector(1), [1, 3], point, scale=2.0)] for point in POINTS},
    **{
        f"resid_post {mode}": [Steering(vector(2), 2, mode=mode, scale=1.5)]
        for mode in ("ablate", "clamp", "add_keep_norm")
    },
    "resid_mid ablate": [Steering(vector(2), "all", "resid_mid", "ablate")],
    "from a position": [Steering(vector(3), 1, scale=4.0, positions=3)],
    "listed": [Steering(vector(3), 1, scale=4.0, positions=[0, 4])],
    "last of the prompt": [Steering(vector(3), 1, scale=4.0, positions="last_prompt")],
    "two names of a residual, in order": [
        Steering(vector(4), 2, "resid_pre", "clamp", 3.0),
        Steering(vector(5), 1, "resid_post", "add", 3.0),
        Steering(vector(4), 2, "resid_pre", "ablate", 0.5),
    ],
    "vectors by layer": [
        Steering(SteeringVectors({Tap(n, "mlp_out"): vector(n) for n in (0, 4)}, {}, 6), scale=2.0)
    ],
}


@pytest.mark.parametrize("name", EDITS)
def test_their_model_and_ours_are_edited_as_by_the_engine(
    name: str, lm: LanguageModel, theirs: LlamaForCausalLM, ids: Tensor
) -> None:
    edits = EDITS[name]
    trace = lm.lens(PROMPT, layers=[-1], top_k=9, steering=edits)
    plain = lm.lens(PROMPT, layers=[-1], top_k=9)
    with torch.no_grad():
        with steered(theirs, edits, prompt_length=ids.shape[1]):
            logits = theirs(ids).logits[0]
        with steered(lm.model, edits, prompt_length=ids.shape[1]):
            ours = lm.model.head(lm.model.norm(lm.model(ids)))[0]
    for found in (logits, ours):
        logprobs = found.log_softmax(-1).gather(-1, trace.token_ids[:, 0])
        torch.testing.assert_close(logprobs, trace.logprobs[:, 0], atol=2e-4, rtol=0)
    assert (plain.logprobs - trace.logprobs).abs().max() > 2e-2
    assert is_clean(theirs) and is_clean(lm.model)


def test_positions_come_from_the_model(theirs: LlamaForCausalLM, ids: Tensor) -> None:
    """The same text after padding on the left, and in two steps with a cache."""
    edits = [Steering(vector(6), 1, scale=5.0, positions=[1, 4])]
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    with torch.no_grad(), steered(theirs, edits):
        whole = theirs(ids).logits
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        later = theirs(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        first = theirs(ids[:, :3], use_cache=True)
        second = theirs(ids[:, 3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(later, whole, atol=1e-3, rtol=0)
    torch.testing.assert_close(second.logits, whole[:, 3:], atol=1e-3, rtol=0)
    assert (theirs(ids).logits - whole).abs().max() > 0.1


@pytest.mark.parametrize("which", ["theirs", "ours"])
@pytest.mark.parametrize("mode", ["add", "ablate", "clamp", "add_keep_norm"])
def test_gradients_flow_to_vectors_and_scales(
    which: str, mode: str, lm: LanguageModel, theirs: LlamaForCausalLM, ids: Tensor
) -> None:
    direction, scale = vector(7).requires_grad_(), torch.tensor(1.5, requires_grad=True)

    def loss(direction: Tensor, scale: Tensor | float) -> Tensor:
        edit = Steering(direction, [1, 4], mode=mode, scale=scale)
        model = theirs if which == "theirs" else lm.model
        with steered(model, edit):
            if which == "theirs":
                return theirs(ids).logits[0, -1].log_softmax(-1)[7]
            return lm.model.head(lm.model.norm(lm.model(ids)))[0, -1].log_softmax(-1)[7]

    loss(direction, scale).backward()
    assert direction.grad is not None and scale.grad is not None
    along, step = vector(8), 1e-2
    with torch.no_grad():
        for grad, up, down in (
            (
                direction.grad @ along,
                loss(direction + step * along, 1.5),
                loss(direction - step * along, 1.5),
            ),
            (scale.grad, loss(direction, 1.5 + step), loss(direction, 1.5 - step)),
        ):
            torch.testing.assert_close(grad, (up - down) / (2 * step), atol=2e-3, rtol=2e-2)
    for parameter in (*theirs.parameters(), *lm.model.parameters()):
        parameter.grad = None


def test_checkpointed_blocks_have_the_gradients_of_others(
    theirs: LlamaForCausalLM, ids: Tensor
) -> None:
    def gradient(model: LlamaForCausalLM) -> Tensor:
        direction = vector(9).requires_grad_()
        with steered(model, Steering(direction, 2, "mlp_out", scale=2.0)):
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert direction.grad is not None
        return direction.grad

    plain = gradient(theirs)
    checkpointed = LlamaForCausalLM.from_pretrained(str(DEMO), dtype=torch.float32).train()
    checkpointed.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(checkpointed), plain)
    assert plain.abs().max() > 1e-4
    theirs.zero_grad()


def test_a_watch_inside_reads_what_edits_made(theirs: LlamaForCausalLM, ids: Tensor) -> None:
    edit = Steering(vector(1), 1, scale=3.0)
    with torch.no_grad():
        with watch(theirs, layers=1) as before:
            theirs(ids)
        with steered(theirs, edit), watch(theirs, layers=1) as after:
            theirs(ids)
    torch.testing.assert_close(after.stacked(), before.stacked() + 3.0 * vector(1))


@pytest.mark.parametrize("which", ["theirs", "ours"])
def test_contexts_add_up_in_their_order(
    which: str, lm: LanguageModel, theirs: LlamaForCausalLM, ids: Tensor
) -> None:
    clamp, add = Steering(vector(4), 2, mode="clamp", scale=3.0), Steering(vector(4), 2, scale=0.3)
    model = theirs if which == "theirs" else lm.model
    both = ("resid_post", "mlp_out")
    with torch.no_grad():
        with steered(model, [clamp, add]), watch(model, layers=2) as expected:
            model(ids)
        in_turn = steered(model, clamp), steered(model, add)
        with in_turn[0], in_turn[1], watch(model) as found, watch(model, points=both) as other:
            model(ids)
    state = Tap(2, "resid_post")
    assert torch.equal(found.states[state], expected.states[state])
    assert torch.equal(other.states[state], expected.states[state])
    assert is_clean(model)


@pytest.mark.slow
def test_compiled_once_however_the_vector_changes(theirs: LlamaForCausalLM, ids: Tensor) -> None:
    torch._dynamo.reset()
    counter, edit = CompileCounter(), Steering(vector(1), [1, 2], scale=3.0)
    compiled = torch.compile(theirs, backend=counter)
    with torch.no_grad():
        with steered(theirs, edit):
            expected = theirs(ids).logits
        with steered(theirs, edit):
            assert torch.equal(compiled(ids).logits, expected)
            frames = counter.frame_count
            for _ in range(3):
                compiled(ids)
            assert counter.frame_count == frames
        assert torch.equal(compiled(ids).logits, theirs(ids).logits)
        with (
            pytest.raises(ValueError, match="compiled before it was steered"),
            steered(theirs, edit),
        ):
            compiled(ids)
    torch._dynamo.reset()


REFUSALS: dict[str, tuple[Callable[[], object], dict[str, object], str]] = {
    "no steering": (lambda: "x", {}, "steering"),
    "another depth": (
        lambda: Steering(SteeringVectors({Tap(0, "mlp_out"): vector(1)}, {}, 9)),
        {},
        "for a model of 9 layers, this one has 6",
    ),
    "no such layer": (lambda: Steering(vector(1), 6), {}, "layer 6 does not exist"),
    "no prompt": (lambda: Steering(vector(1), positions="prompt"), {}, "needs prompt_length"),
    "another width": (
        lambda: Steering(vector(1, d=64), 0),
        {},
        "64 numbers, the model's states 128",
    ),
    "no pass": (lambda: Steering(vector(1), 0), {"run": False}, "no pass ran"),
    "a bad length": (lambda: Steering(vector(1)), {"prompt_length": 1.5}, "prompt_length"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str, theirs: LlamaForCausalLM, ids: Tensor) -> None:
    make, options, says = REFUSALS[name]
    options = dict(options)
    runs = options.pop("run", True)
    with pytest.raises(ValueError, match=says), steered(theirs, make(), **options):  # type: ignore[arg-type]
        if runs:
            theirs(ids)
    assert is_clean(theirs)


def test_an_error_inside_passes_through(theirs: LlamaForCausalLM) -> None:
    with pytest.raises(RuntimeError, match="broken"), steered(theirs, Steering(vector(1), 0)):
        raise RuntimeError("broken")
    assert is_clean(theirs)

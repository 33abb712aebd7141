"""Vectors from pairs against whole passes of transformers, in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from conftest import RunRanks
from oracles import hf_model, save
from steered import load
from tolerances import EFFECT, EXTRACTED, SAME_STATES
from torch import Tensor

from shardlens.engine import SteeringVectors
from shardlens.interp import (
    METHODS,
    Pair,
    PromptForm,
    encode_contrast,
    encode_pairs,
    extract,
    pair_states,
)
from shardlens.model import DEMO, POINTS, Tap, Transformer
from shardlens.parallel import TensorParallel
from shardlens.tokenizer import Tokenizer

FOUR_RANKS = dict(vocab_size=1280, num_key_value_heads=4)
ALL_BUT_PRE, ALL_BUT_POST = POINTS[1:], POINTS[:-1]  # both would name most states twice

OPTIONS = "\n (A) She ran.\n (B) She sat."
LETTERED = [
    Pair("Lily saw a cat." + OPTIONS, " (A)", " (B)"),
    Pair("Tom was sad. What did Lily do?" + OPTIONS, " (B)", " (A)"),
    Pair("One day it was big." + OPTIONS, "(A) She ran and ran to the big tree.", "(B) No"),
    Pair("Mom had a ball." + OPTIONS, " (A) And", " (B) She sat down and was happy."),
    Pair("Lily is big.", " (A) So", " (B) Yes", other_question="Once there was a sad little cat."),
]
PLAIN = [
    Pair("", "Lily was so happy that she ran", "Tom sat"),
    Pair("", "The sun was red", "One day a big dog was sad and ran to the park"),
    Pair("", "The sun was big and red", "The sun was big and sad and old"),
]
# Where a bug could read: a token before, or after where there is one.
MISREAD = {"label": (-1, 1), "last": (-1,), "mean": (-1, 1)}
CONTRAST = ("You like to run.", "You are sad and would much rather sit.")
SINGLE = TensorParallel.single()


@dataclass
class Case:
    """A model of transformers, the same one on disk, and a tokenizer as two libraries read it."""

    hf: Any
    directory: Path
    tokenizer: Tokenizer
    other_tokenizer: tokenizers.Tokenizer

    def __post_init__(self) -> None:
        self.hf.double()
        self._states: dict[tuple[int, ...], dict[Tap, Tensor]] = {}

    def states(self, ids: Sequence[int]) -> dict[Tap, Tensor]:
        """[T, d] float64 at every tap of a whole pass."""
        if tuple(ids) not in self._states:
            self._states[tuple(ids)] = hf_states(self.hf, ids)
        return self._states[tuple(ids)]

    def model(self, parallel: TensorParallel | None = None) -> Transformer:
        return load(self.directory, parallel or SINGLE)


@torch.no_grad()
def hf_states(hf: Any, ids: Sequence[int]) -> dict[Tap, Tensor]:
    """By hooks: the last of `output_hidden_states` has passed the final norm."""
    found: dict[Tap, Tensor] = {}

    def takes_input(tap: Tap) -> Any:
        return lambda _, args: found.__setitem__(tap, args[0][0].clone())

    def takes_output(tap: Tap) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            found[tap] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        return hook

    handles = []
    for number, layer in enumerate(hf.model.layers):
        before = {"resid_pre": layer, "resid_mid": layer.post_attention_layernorm}
        after = {
            "attn_norm": layer.input_layernorm,
            "attn_out": layer.self_attn,
            "mlp_norm": layer.post_attention_layernorm,
            "mlp_out": layer.mlp,
            "resid_post": layer,
        }
        for point, module in before.items():
            handles.append(module.register_forward_pre_hook(takes_input(Tap(number, point))))
        for point, module in after.items():
            handles.append(module.register_forward_hook(takes_output(Tap(number, point))))
    hidden = hf(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for number in range(len(hf.model.layers)):
        assert torch.equal(hidden[number][0], found[Tap(number, "resid_pre")])
    return found


@dataclass(frozen=True)
class Text:
    """One side of a pair, where it is read, and where a bug could read it."""

    ids: list[int]
    answer_at: int
    label_at: int

    def rows(self, at: str, moved: int = 0) -> slice:
        if at == "mean":
            return slice(max(1, self.answer_at) + moved, len(self.ids))
        position = self.label_at if at == "label" else len(self.ids) - 1
        return slice(position + moved, position + moved + 1)


def text_of(case: Case, question: str, answer: str) -> Text:
    """Written out here again, its tokens and their positions as `tokenizers` has them."""
    if not question:
        ids = case.other_tokenizer.encode(answer).ids
        n_begin = 0 if case.tokenizer.bos_id is None else 1
        return Text(ids, answer_at=n_begin, label_at=-1)
    before, answer = question + "\nAnswer: ", answer.strip()
    encoded = case.other_tokenizer.encode(before + answer)
    return Text(
        encoded.ids,
        encoded.char_to_token(len(before)),
        encoded.char_to_token(len(before) + answer.index("(") + 1),
    )


def texts_of(case: Case, pairs: Sequence[Pair]) -> list[tuple[Text, Text]]:
    """The matching side and the other of each."""
    return [
        (
            text_of(case, pair.questions[0], pair.matching),
            text_of(case, pair.questions[1], pair.other),
        )
        for pair in pairs
    ]


def contrast_of(case: Case, pairs: Sequence[Pair]) -> list[tuple[Text, Text]]:
    """Both sides end before the label's token; what would follow is left to a test to drop."""
    sides = []
    for pair in pairs:
        whole = [text_of(case, f"{text}\n{pair.question}", pair.matching) for text in CONTRAST]
        sides.append(tuple(Text(item.ids[: item.label_at], -1, item.label_at) for item in whole))
    return sides  # type: ignore[return-value]


def read(case: Case, texts: list[tuple[Text, Text]], tap: Tap, at: str, moved: int = 0) -> Tensor:
    """[2, N, d] float64"""
    each = [[case.states(t.ids)[tap][t.rows(at, moved)].mean(0) for t in two] for two in texts]
    return torch.stack([torch.stack(list(side)) for side in zip(*each, strict=True)])


def miss(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


MODELS = {"llama": "llama-mha", "qwen3": "qwen3"}


@pytest.fixture(scope="module", params=["stories", *MODELS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param == "stories":
        import transformers

        directory = tokens = request.getfixturevalue("stories")
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager"
        )
    else:
        torch.manual_seed(0)
        hf = hf_model(MODELS[request.param], **FOUR_RANKS)
        directory, tokens = save(hf, tmp_path_factory.mktemp(request.param)), DEMO
    return Case(
        hf,
        directory,
        Tokenizer.from_directory(tokens),
        tokenizers.Tokenizer.from_file(str(tokens / "tokenizer.json")),
    )


def on_ranks(
    case: Case, size: int, run_ranks: RunRanks, pairs: Sequence[Pair], **options: Any
) -> SteeringVectors:
    """The vectors, of which every rank has the same."""

    def body(parallel: TensorParallel) -> SteeringVectors:
        return extract(case.model(parallel), case.tokenizer, pairs, **options)

    first, *others = run_ranks(size, body)
    for other in others:
        assert first.taps == other.taps and first.origin == other.origin
        assert all(torch.equal(first.at(tap), other.at(tap)) for tap in first.taps)
        assert first.resid_norms == other.resid_norms
    return first  # type: ignore[no-any-return]


def mean_gap(case: Case, texts: list[tuple[Text, Text]], tap: Tap, at: str, moved: int) -> Tensor:
    matching, other = read(case, texts, tap, at, moved)
    return (matching - other).mean(0)


def assert_norms(
    found: SteeringVectors, case: Case, texts: list[tuple[Text, Text]], tap: Tap, at: str
) -> None:
    """Means of norms, over the positions and then the texts, which are not norms of means."""
    each = [case.states(t.ids)[tap][t.rows(at)] for two in texts for t in two]
    norm = float(torch.stack([states.norm(dim=-1).mean() for states in each]).mean())
    assert found.resid_norms[tap] == pytest.approx(norm, rel=EXTRACTED)
    means = torch.stack([states.mean(0) for states in each])
    wrong = [means.mean(0).norm(), *([means.norm(dim=-1).mean()] if at == "mean" else [])]
    assert all(abs(float(other) / norm - 1) > EFFECT * EXTRACTED for other in wrong)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("at", ["label", "last", "mean"])
def test_mean_differences(at: str, size: int, case: Case, run_ranks: RunRanks) -> None:
    """Answers of one length and of two, after one question and after two, and plain texts."""
    pairs = LETTERED if at == "label" else LETTERED + PLAIN
    texts = texts_of(case, pairs)
    found = on_ranks(case, size, run_ranks, pairs, point=ALL_BUT_PRE, at=at)
    assert len(found.taps) == found.n_layers * len(ALL_BUT_PRE)
    for tap in found.taps:
        sides = read(case, texts, tap, at)
        expected = (sides[0] - sides[1]).mean(0)
        assert miss(found.at(tap), expected) <= EXTRACTED
        assert_norms(found, case, texts, tap, at)
        # not subtracted, turned round, another layer's, or a token earlier or later
        elsewhere = Tap((tap.layer + 1) % found.n_layers, tap.point)
        wrong = [sides[0].mean(0), -expected, mean_gap(case, texts, elsewhere, at, 0)]
        wrong += [mean_gap(case, texts, tap, at, moved) for moved in MISREAD[at]]
        assert all(miss(item, expected) > EFFECT * EXTRACTED for item in wrong)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_contrast(size: int, case: Case, run_ranks: RunRanks) -> None:
    """One question after two texts. At the same token, the first layer's input is no vector.

    The gap is some hundredths of the states, and float32 rounds the states, in transformers as
    much as here: errors are relative to their largest entry.
    """
    texts = contrast_of(case, LETTERED)
    options: dict[str, Any] = dict(point=ALL_BUT_POST, contrast=CONTRAST)
    layers = range(1, len(case.hf.model.layers))
    found = on_ranks(case, size, run_ranks, LETTERED, layers=layers, **options)
    assert found.origin.positions == "contrast" and found.taps[0] == Tap(1, "resid_pre")
    for tap in found.taps:
        sides = read(case, texts, tap, "last")
        expected = (sides[0] - sides[1]).mean(0)
        atol = EXTRACTED * sides.abs().max()
        assert (found.at(tap) - expected).abs().max() <= atol
        assert_norms(found, case, texts, tap, "last")
        for wrong in (-expected, mean_gap(case, texts, tap, "last", -1)):
            assert (wrong - expected).abs().max() > EFFECT * atol
    with pytest.raises(ValueError) as caught:
        extract(case.model(), case.tokenizer, LETTERED, **options)
    assert str(caught.value) == (
        "the steering vector at resid_pre of layer 0 is all zeros: it has no direction"
    )


CHAT_PAIR = Pair("Sure?\n (A) yes\n (B) no", " (A) I am", " (B)")


@pytest.mark.parametrize("name", ["llama3.1-hf", "qwen3-hf"])
def test_contrast_in_a_chat(name: str, shared_data: Path) -> None:
    """The texts are system messages; both sides end right before the token of the label."""
    tokenizer = Tokenizer.from_directory(shared_data / "tokenizers" / name)
    with_system = PromptForm(chat=True, system="Be brief.")
    for form in (PromptForm(chat=True), with_system):
        encoded = encode_contrast(tokenizer, CHAT_PAIR, form, CONTRAST)
        for side, text in zip((encoded.matching, encoded.other), CONTRAST, strict=True):
            messages = [
                {"role": "system", "content": text},
                {"role": "user", "content": CHAT_PAIR.question},
            ]
            # "(A" is one token, so that nothing of the answer is before it
            assert side.ids == tokenizer.chat(messages)
            assert side.label_at is None
        assert encoded.matching.ids[-1] == encoded.other.ids[-1]
    bare = encode_contrast(tokenizer, CHAT_PAIR, PromptForm(), CONTRAST)
    for side, text in zip((bare.matching, bare.other), CONTRAST, strict=True):
        assert tokenizer.decode(side.ids) == f"{text}\n{CHAT_PAIR.question}\nAnswer: ("
    # an answer that begins with words before its label keeps them
    spoken = Pair(CHAT_PAIR.question, "**A** I am", "**B**")
    side = encode_contrast(tokenizer, spoken, PromptForm(chat=True), CONTRAST).other
    assert tokenizer.decode(side.ids, skip_special=False).endswith("\n**")


NAMES = "Lily Tom Mom Dad Ben Sue Max Anna Tim Sam Jack Mia".split()
THINGS = "cat dog ball sun tree car bird fish park hat bed sad".split()
TWELVE = [
    Pair(f"{name} saw a {thing}.{OPTIONS}", " (A)", " (B)")
    for name, thing in zip(NAMES, THINGS, strict=True)
]


def along(direction: Any, mean: Any) -> Tensor:
    """The mean's component along a direction, whichever way that points."""
    unit = direction / np.linalg.norm(direction)
    return torch.from_numpy(unit * (mean @ unit))


@pytest.mark.parametrize("d", [8, 48])
def test_methods(d: int, tmp_path: Path) -> None:
    """From 12 pairs: fewer than a state has numbers, or more."""
    from sklearn.linear_model import LogisticRegression

    model = load(save(hf_model("llama-mha", hidden_size=d, **FOUR_RANKS), tmp_path), SINGLE)
    tokenizer = Tokenizer.from_directory(DEMO)
    encoded = encode_pairs(tokenizer, TWELVE, PromptForm())
    found = {m: extract(model, tokenizer, TWELVE, method=m) for m in METHODS}
    taps = found["pca"].taps
    states = torch.stack([pair_states(model, pair, taps, "label") for pair in encoded], 1)
    for column, tap in enumerate(taps):
        sides = states[:, :, column].numpy()  # [2, 12, d]
        gaps, mean = sides[0] - sides[1], (sides[0] - sides[1]).mean(0)
        directions = np.linalg.svd(gaps)[2]
        rows = sides.reshape(24, d) / np.linalg.norm(sides, axis=-1).mean()
        fit = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(rows, [1] * 12 + [0] * 12)
        expected = {"pca": along(directions[0], mean), "logistic": along(fit.coef_[0], mean)}
        for method, vector in expected.items():
            ours = found[method].at(tap)
            tolerance = SAME_STATES if method == "pca" else EXTRACTED
            assert miss(ours, vector) <= tolerance
            assert ours.double().numpy() @ mean > 0
            unscaled = ours / ours.norm()
            assert miss(unscaled, vector) > EFFECT * tolerance
            assert miss(torch.from_numpy(mean), vector) > EFFECT * tolerance
        centred = np.linalg.svd(gaps - mean)[2][0]
        for other in (along(centred, mean), along(directions[1], mean)):
            assert miss(other, expected["pca"]) > EFFECT * SAME_STATES
        assert miss(found["mean_diff"].at(tap), torch.from_numpy(mean)) <= SAME_STATES


def test_texts_with_nothing_in_common(tmp_path: Path) -> None:
    """A tokenizer without a BOS leaves no prefix at all to share."""
    content = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    hf, tokenizer = hf_model("qwen3", **FOUR_RANKS), Tokenizer.from_directory(tmp_path)
    other_tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    case = Case(hf, save(hf, tmp_path / "model"), tokenizer, other_tokenizer)
    encoded = encode_pairs(tokenizer, PLAIN, PromptForm(), needs_label=False)
    assert encoded[0].n_shared == encoded[0].matching.answer_at == 0
    texts = texts_of(case, PLAIN)
    for at in ("last", "mean"):
        found = extract(case.model(), tokenizer, PLAIN, point=ALL_BUT_POST, at=at)
        for tap in found.taps:
            expected = mean_gap(case, texts, tap, at, 0)
            assert miss(found.at(tap), expected) <= EXTRACTED
            assert_norms(found, case, texts, tap, at)
            if at == "mean":  # position 0, the attention sink, is left out without a BOS, too
                with_sink = mean_gap(case, texts, tap, at, -1)
                assert miss(with_sink, expected) > EFFECT * EXTRACTED

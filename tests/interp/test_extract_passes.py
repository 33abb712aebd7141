"""The origin, passes, exchanges and refusals of extraction."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunRanks
from oracles import hf_model, save
from steered import load
from tolerances import EXTRACTED
from torch import Tensor

from shardlens.engine import Origin, model_fingerprint
from shardlens.interp import METHODS, Pair, PromptForm, encode_pairs, extract
from shardlens.model import DEMO, POINTS, Tap, Transformer
from shardlens.parallel import TensorParallel
from shardlens.tokenizer import Tokenizer

SINGLE = TensorParallel.single()
ALL_BUT_PRE, ALL_BUT_POST = POINTS[1:], POINTS[:-1]  # both would name most states twice

SHORT = [Pair(f"{name} ran. (A) or (B)?", " (A)", " (B)") for name in ("Lily", "Tom", "Mom")]
LONGER = Pair("Mom had a ball.", " (A) And", " (B) She sat down and was happy.")
LABELS_FIRST = Pair("Tom ran.", "(A) to the big tree.", "(B) No")
PLAIN = [Pair("", "Lily was so happy", "Tom sat"), Pair("", "The sun was red", "One day a dog")]
CONTRAST = ("You like to run.", "You are sad and would much rather sit.")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(hf_model("llama-mha", vocab_size=1280), tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(directory: Path) -> Transformer:
    return load(directory, SINGLE)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


def test_origin(
    directory: Path, model: Transformer, tokenizer: Tokenizer, run_ranks: RunRanks
) -> None:
    """The fingerprint is of the weights, on any number of ranks and in either dtype."""
    digits = model_fingerprint(model)
    found = extract(model, tokenizer, PLAIN, method="pca", at="mean", layers=[2])
    keys = tuple(pair.key for pair in PLAIN)
    assert found.origin == Origin(digits, "pca", "mean", n_pairs=2, pair_keys=keys)
    assert found.n_layers == 3 and found.warning(digits) is None
    for size in (2, 4):
        prints = run_ranks(size, lambda parallel: model_fingerprint(load(directory, parallel)))
        assert set(prints) == {digits}
    assert model_fingerprint(load(directory, SINGLE).bfloat16()) == digits
    model.blocks[1].mlp_norm.weight[7] *= 1.02
    assert model_fingerprint(model) != digits


def test_progress(model: Transformer, tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, int]] = []
    extract(model, tokenizer, SHORT, on_progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes [texts, tokens] of the passes that are run from here on."""
    shapes: list[tuple[int, ...]] = []
    run = Transformer.through_blocks

    def through_blocks(self: Transformer, token_ids: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(token_ids.shape))
        return run(self, token_ids, *rest)

    monkeypatch.setattr(Transformer, "through_blocks", through_blocks)
    return shapes


@pytest.mark.parametrize("at", ["label", "last", "mean"])
def test_a_prompt_is_fed_once(
    at: str, fed: list[tuple[int, ...]], model: Transformer, tokenizer: Tokenizer
) -> None:
    """And of the answers no more than what is read, and nothing after it."""
    pair = LONGER
    extract(model, tokenizer, [pair], at=at)
    texts = [f"{pair.question}\nAnswer:{answer}" for answer in (pair.matching, pair.other)]
    sides = [tokenizer.encode(text) for text in texts]
    label_at = next(n for n, ids in enumerate(zip(*sides, strict=False)) if ids[0] != ids[1])
    n_shared = label_at - 1 if at == "mean" else label_at  # the bracket is of the answer
    longest = max(map(len, sides))
    assert longest > label_at + 4
    assert fed == [(1, n_shared), (2, 1 if at == "label" else longest - n_shared)]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_exchange_what_the_passes_do(
    size: int, directory: Path, tokenizer: Tokenizer, run_ranks: RunRanks
) -> None:
    """States are whole on every rank. The second prompt of each pair would show, too."""
    pairs = encode_pairs(tokenizer, [*SHORT, LONGER], PromptForm())

    def body(parallel: TensorParallel) -> None:
        model, traffic = load(directory, parallel), parallel.traffic
        traffic.reset()
        extract(model, tokenizer, [*SHORT, LONGER], point=ALL_BUT_PRE)
        ours = traffic.copy()
        traffic.reset()
        with torch.no_grad():
            for pair in pairs:
                model(torch.zeros(1, pair.n_shared, dtype=torch.int64))
                model(torch.zeros(2, 1, dtype=torch.int64))
            passes = traffic.copy()
            traffic.reset()
            for pair in pairs:
                model(torch.zeros(2, pair.n_shared + 1, dtype=torch.int64))
        assert ours == passes and ours.calls.get("all_gather", 0) == 0 < ours.total_bytes
        assert traffic.total_bytes > 1.5 * ours.total_bytes

    run_ranks(size, body)


LAST_ALIKE = Pair("", "Once upon a time", "One day a time")
LONG = Pair("Lily ran." * 40, "(A)", "(B)")
WRONG: dict[str, tuple[list[Pair], dict[str, Any]]] = {
    "no pair is given": ([], {}),
    f"point nowhere does not exist: there are {', '.join(POINTS)}": (SHORT, {"point": "nowhere"}),
    "no point is given": (SHORT, {"point": ()}),
    "resid_post of a layer is resid_pre of the next: give one of the two": (
        SHORT,
        {"point": POINTS},
    ),
    "layer 3 does not exist: the model has layers 0 to 2": (SHORT, {"layers": [3]}),
    "method median does not exist: there are mean_diff, pca, logistic": (
        SHORT,
        {"method": "median"},
    ),
    "states at first does not exist: there are label, last, mean": (SHORT, {"at": "first"}),
    "pair 2 has 246 tokens, more than the context of 128": ([SHORT[0], LONG], {}),
    'pair 2: the label "Yes" is 2 tokens (" Y", "es"): choose pairs whose answers differ in one '
    "token": ([SHORT[0], Pair("Sure?", "Yes", "No")], {}),
    "pair 1: plain texts have no label: read their last position or their mean": (PLAIN, {}),
    "pair 1: plain texts have no question to put a text before": (PLAIN, {"contrast": CONTRAST}),
    "pair 1: both sides have the same tokens, so their difference is zero everywhere": (
        SHORT,
        {"contrast": ("Run.", "Run.")},
    ),
    "pair 2 has the same state on both sides: the last tokens are the same, and no tap read "
    "depends on those before them": (
        [PLAIN[0], LAST_ALIKE],
        {"point": "resid_pre", "layers": [0], "at": "last"},
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_refused(
    message: str, fed: list[tuple[int, ...]], model: Transformer, tokenizer: Tokenizer
) -> None:
    """Before any pass, but for what only states can tell."""
    pairs, options = WRONG[message]
    with pytest.raises(ValueError) as caught:
        extract(model, tokenizer, pairs, **options)
    assert str(caught.value) == message
    assert bool(fed) == ("same state" in message)


def set_labels(model: Transformer, tokenizer: Tokenizer, gap: float) -> tuple[Tensor, Tensor]:
    """Gives B the embedding of A, moved by noise of size `gap`. Returns both."""
    a, b = (tokenizer.encode(f"({label}", bos=False)[-1] for label in "AB")
    weight = model.embed.weight
    weight[b] = weight[a] + gap * torch.randn(weight.shape[1])
    return weight[a].clone(), weight[b].clone()


@pytest.mark.parametrize("at", ["label", "last", "mean"])
def test_labels_that_the_model_cannot_tell_apart(
    at: str, model: Transformer, tokenizer: Tokenizer
) -> None:
    set_labels(model, tokenizer, gap=0.0)
    why = {
        "label": "the model does not tell the two labels apart",
        "last": "the last tokens are the same, and no tap read depends on those before them",
        "mean": "the answers are the same for the model",
    }
    with pytest.raises(ValueError) as caught:
        extract(model, tokenizer, [LABELS_FIRST, SHORT[0]], at=at)
    number = 1 if at == "label" else 2  # those of the first go on with other words
    expected = f"pair {number} has the same state on both sides: {why[at]}"
    assert str(caught.value) == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_tap_without_a_gap(method: str, model: Transformer, tokenizer: Tokenizer) -> None:
    """Both texts of every pair end alike, which shows in the first layer's input alone."""
    options: dict[str, Any] = dict(at="last", method=method)
    with pytest.raises(ValueError) as caught:
        extract(model, tokenizer, SHORT, point=ALL_BUT_POST, **options)
    assert str(caught.value) == (
        "the steering vector at resid_pre of layer 0 is all zeros: it has no direction"
    )
    extract(model, tokenizer, SHORT, point="resid_pre", layers="1-2", **options)


@pytest.mark.parametrize("method", METHODS)
def test_small_gaps(method: str, model: Transformer, tokenizer: Tokenizer) -> None:
    """A thousandth of the states is a direction, too; a search may not stop where it begins."""
    a, b = set_labels(model, tokenizer, gap=1e-3)
    found = extract(model, tokenizer, SHORT, point="resid_pre", layers=[0], method=method)
    error = found.at(Tap(0, "resid_pre")) - (a - b)
    assert error.abs().max() <= EXTRACTED * (a - b).abs().max()


def test_a_missing_package_is_refused_first(
    fed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    model: Transformer,
    tokenizer: Tokenizer,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError) as caught:
        extract(model, tokenizer, SHORT, method="logistic")
    assert str(caught.value) == "method logistic needs sklearn: pip install 'shardlens[probe]'"
    assert not fed

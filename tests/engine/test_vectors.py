"""Steering vectors: what is refused, look-ups by tap, and the algebra against numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_almost_equal_nulp
from torch import Tensor

from shardlens.engine import Origin, SteeringVectors, fingerprint
from shardlens.engine.tap_names import listed
from shardlens.model import DEMO, ModelConfig, Tap

D, N_LAYERS = 37, 6
TAPS = (Tap(4, "mlp_norm"), Tap(2, "resid_post"), Tap(2, "attn_out"))
IN_ORDER = (Tap(2, "attn_out"), Tap(2, "resid_post"), Tap(4, "mlp_norm"))
ORIGIN = Origin("0123456789abcdef", "mean_diff", "label", 2, ("a" * 16, "b" * 16))


def made(seed: int = 0, taps: Sequence[Tap] = TAPS, d: int = D) -> SteeringVectors:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVectors(
        {tap: 3 * torch.randn(d, generator=generator) for tap in taps},
        {tap: 10.5 + tap.layer for tap in taps},
        N_LAYERS,
        ORIGIN,
    )


def exact(vectors: SteeringVectors, tap: Tap) -> np.ndarray:
    return vectors.at(tap).numpy().astype(np.float64)


def assert_rounded_once(ours: Tensor, truth: np.ndarray) -> None:
    assert_array_almost_equal_nulp(ours.numpy(), truth.astype(np.float32), nulp=1)


def test_taps_are_ordered_by_layer_and_by_the_way_through_a_block() -> None:
    assert made().taps == IN_ORDER
    assert (made().d, made().n_layers) == (D, N_LAYERS)


def test_one_tap_has_two_names() -> None:
    vectors = made()
    assert vectors.at(Tap(3, "resid_pre")) is vectors.at(Tap(2, "resid_post"))
    assert vectors.resid_norm(Tap(3, "resid_pre")) == 12.5
    assert vectors.norm(Tap(3, "resid_pre")) == np.linalg.norm(exact(vectors, Tap(2, "resid_post")))
    with pytest.raises(ValueError, match="two vectors for one tap, resid_post of layer 2"):
        made(taps=(Tap(2, "resid_post"), Tap(3, "resid_pre")))


def test_a_missing_vector_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no vector at resid_post of layer 3: there are attn_out"):
        made().at(Tap(3, "resid_post"))
    taps = [Tap(layer, "resid_post") for layer in (1, 2, 3, 5)]
    assert listed([*taps, Tap(0, "mlp_out")]) == "resid_post of layers 1-3, 5; mlp_out of layers 0"


@pytest.mark.parametrize("tap", [1, "mlp_out", (1,), (True, "mlp_out"), ("mlp_out", 1)])
def test_vectors_are_by_tap(tap: Any) -> None:
    says = r"are for .*: give a dict by Tap\(layer, point\)$"
    with pytest.raises(ValueError, match=f"the steering vectors {says}"):
        SteeringVectors({tap: torch.ones(D)}, {}, N_LAYERS)
    with pytest.raises(ValueError, match=f"the norms of the states {says}"):
        SteeringVectors({TAPS[0]: torch.ones(D)}, {tap: 1.0}, N_LAYERS)
    plain = SteeringVectors({(np.int64(2), "mlp_out"): torch.ones(D)}, {}, N_LAYERS)
    assert plain.taps == (Tap(2, "mlp_out"),) and type(plain.taps[0].layer) is int


def test_norms_of_the_states_may_be_missing() -> None:
    vectors = dataclasses.replace(made(), resid_norms={Tap(3, "resid_pre"): 2.0})
    assert vectors.resid_norms == {Tap(2, "resid_post"): 2.0}
    with pytest.raises(ValueError, match="attn_out of layer 2: give scales in units of the vector"):
        vectors.resid_norm(Tap(2, "attn_out"))


def test_vectors_are_copies_in_float32() -> None:
    table = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    vectors = SteeringVectors({Tap(1, "mlp_out"): table[1]}, {}, N_LAYERS)
    found = vectors.at(Tap(1, "mlp_out"))
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.untyped_storage().nbytes() == 4 * D


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.ones(D).index_fill(0, torch.tensor(3), float("nan")), "layer 3 is not finite"),
        (torch.ones(D, dtype=torch.float64) * 1e300, "layer 3 is not finite"),
        (torch.zeros(D), "layer 3 is all zeros"),
        (torch.ones(0), "layer 3 has 0 numbers, the first one 37"),
        (torch.ones(D + 1), "layer 3 has 38 numbers, the first one 37"),
        (torch.ones(1, D), r"layer 3 has shape \[1, 37\]: it needs one dim"),
    ],
)
def test_a_vector_without_a_direction_is_refused(vector: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"steering vector at mlp_out of {message}"):
        SteeringVectors({Tap(1, "mlp_out"): torch.ones(D), Tap(3, "mlp_out"): vector}, {}, N_LAYERS)


def test_taps_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no steering vectors"):
        SteeringVectors({}, {}, N_LAYERS)
    with pytest.raises(ValueError, match="layer 6 does not exist: the model has layers 0 to 5"):
        made(taps=[Tap(6, "mlp_out")])
    with pytest.raises(ValueError, match="layer -1 does not exist"):
        made(taps=[Tap(-1, "mlp_out")])
    with pytest.raises(ValueError, match="point mlp_outt does not exist"):
        made(taps=[Tap(1, "mlp_outt")])
    with pytest.raises(ValueError, match="a norm of the states is given at resid_mid of layer 0"):
        dataclasses.replace(made(), resid_norms={Tap(0, "resid_mid"): 1.0})
    with pytest.raises(ValueError, match="norm of the states at attn_out of layer 2 is nan"):
        dataclasses.replace(made(), resid_norms={Tap(2, "attn_out"): float("nan")})


def test_another_model_is_refused_or_warned_of() -> None:
    config = dataclasses.replace(ModelConfig.from_hf(DEMO / "config.json"), d=D, n_layers=N_LAYERS)
    made().check(config)
    with pytest.raises(ValueError, match="have 37 numbers, the states of this model 38"):
        made().check(dataclasses.replace(config, d=38))
    with pytest.raises(ValueError, match="model of 6 layers, this one has 7"):
        made().check(dataclasses.replace(config, n_layers=7))
    assert made().warning(ORIGIN.model) is None
    assert dataclasses.replace(made(), origin=Origin()).warning(ORIGIN.model) is None
    warning = made().warning("f" * 16)
    assert warning is not None
    assert ORIGIN.model in warning and "f" * 16 in warning and "\n" not in warning


def test_a_fingerprint_follows_config_and_weights() -> None:
    config = ModelConfig.from_hf(DEMO / "config.json")
    probe = torch.randn(4, 8)
    found = fingerprint(config, probe)
    assert len(found) == 16 and int(found, 16) >= 0
    assert found == fingerprint(config, probe.T.contiguous().T)
    others = (
        fingerprint(dataclasses.replace(config, n_layers=config.n_layers + 1), probe),
        fingerprint(config, probe.bfloat16().float()),
        fingerprint(config, probe.flip(0)),
    )
    assert len({found, *others}) == 4


@pytest.mark.parametrize("tap", TAPS)
def test_algebra_is_that_of_numpy(tap: Tap) -> None:
    a, b = made(0), made(1)
    x, y = exact(a, tap), exact(b, tap)
    assert_rounded_once((a + b).at(tap), x + y)
    assert_rounded_once((a - b).at(tap), x - y)
    assert_rounded_once((-a).at(tap), -x)
    assert_rounded_once((1.7 * a).at(tap), 1.7 * x)
    assert_rounded_once((a * np.float32(0.25)).at(tap), 0.25 * x)


def test_what_is_made_keeps_its_history() -> None:
    a = made(0)
    origin = Origin("f" * 16, "pca", "last", 2, ("b" * 16, "c" * 16))
    b = dataclasses.replace(made(1), resid_norms={}, origin=origin)
    for both, method in ((a + b, "sum"), (a - b, "difference")):
        assert both.resid_norms == a.resid_norms
        assert both.origin == Origin(
            f"{ORIGIN.model}+{'f' * 16}", method, "label", 3, ("a" * 16, "b" * 16, "c" * 16)
        )
        assert both.warning(ORIGIN.model) is not None
    assert (2 * a).origin == dataclasses.replace(ORIGIN, method="scaled")


def test_taps_not_names_must_agree() -> None:
    before = made(taps=[Tap(3, "resid_pre"), Tap(1, "mlp_out")])
    after = made(1, taps=[Tap(2, "resid_post"), Tap(1, "mlp_out")])
    both = before + after
    assert both.taps == before.taps
    truth = exact(before, Tap(3, "resid_pre")) + exact(after, Tap(3, "resid_pre"))
    assert_rounded_once(both.at(Tap(2, "resid_post")), truth)
    for left, right in ((made(), after), (after, made())):
        with pytest.raises(ValueError, match="only one side has a vector at mlp_out of layer 1"):
            left + right
        with pytest.raises(ValueError, match="only one side has a vector at mlp_out of layer 1"):
            left - right


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="of 37 and of 36 numbers"):
        made() + made(d=36)
    with pytest.raises(ValueError, match="of 37 and of 36 numbers"):
        made().cosines(made(d=36))
    with pytest.raises(ValueError, match="models of 6 and of 9 layers"):
        made() - dataclasses.replace(made(1), n_layers=9)
    with pytest.raises(ValueError, match="attn_out of layer 2 is all zeros"):
        made() - made()
    for factor in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cannot be scaled by"):
            made().scaled(factor)
    with pytest.raises(TypeError):
        made() + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        made() * "2"  # type: ignore[operator]


def test_layers_and_taps_can_be_chosen() -> None:
    vectors = made()
    assert vectors.points == ["attn_out", "mlp_norm", "resid_post"]
    assert vectors.restricted([Tap(3, "resid_pre")]).taps == (Tap(2, "resid_post"),)
    assert vectors.restricted(IN_ORDER[:2]).resid_norms == {tap: 12.5 for tap in IN_ORDER[:2]}
    assert vectors.taps_at("mlp_norm") == [Tap(4, "mlp_norm")]
    three = made(taps=[Tap(layer, "mlp_out") for layer in (0, 1, 4)])
    assert three.taps_at("mlp_out", [-2, 0]) == [Tap(0, "mlp_out"), Tap(4, "mlp_out")]
    assert three.select().taps == three.select("mlp_out").taps == three.taps
    assert three.select("mlp_out", "0-1").taps == three.taps[:2]
    assert vectors.select().taps == IN_ORDER
    for layers, message in (
        ("1-2", "have none at layer 2, mlp_out: they have layers 0, 1, 4"),
        ("6", "layer 6 does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            three.select(layers=layers)
    with pytest.raises(ValueError, match="have none at resid_mid: they have mlp_out"):
        three.select("resid_mid")


def test_a_unit_is_the_vector_or_the_norm_of_the_states() -> None:
    vectors, tap = made(), Tap(2, "attn_out")
    assert vectors.unit_scale(tap, "vector") == 1
    assert vectors.unit_scale(tap, "resid_norm") == 12.5 / vectors.norm(tap)
    with pytest.raises(
        ValueError, match="steering unit metre does not exist: there are vector, resid_norm"
    ):
        vectors.unit_scale(tap, "metre")


def test_cosines() -> None:
    a, b = made(0), made(1, taps=[Tap(5, "mlp_out"), Tap(0, "mlp_out")])
    taps, table = a.cosines(b)
    assert taps == IN_ORDER and table.dtype == torch.float32
    x = np.stack([exact(a, tap) for tap in a.taps])
    y = np.stack([exact(b, tap) for tap in b.taps])
    truth = (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    assert_rounded_once(table, truth)
    found = a.cosines()[1]
    assert torch.equal(found, found.T) and torch.equal(found.diagonal(), torch.ones(3))


def test_random_controls_have_the_same_norms_and_a_separate_seed() -> None:
    vectors = made()
    before = torch.get_rng_state()
    drawn = vectors.random_like(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.taps == vectors.taps and drawn.resid_norms == vectors.resid_norms
    assert drawn.origin.method == "random"
    for tap in TAPS:
        assert drawn.norm(tap) == pytest.approx(vectors.norm(tap), rel=torch.finfo().eps)
        assert torch.equal(drawn.at(tap), vectors.random_like(7).at(tap))
        assert not torch.equal(drawn.at(tap), vectors.random_like(8).at(tap))
    wide = made(d=5000)
    table = wide.random_like(1).cosines(wide.random_like(2))[1]
    assert table.abs().max() < 5 / 5000**0.5  # five standard deviations

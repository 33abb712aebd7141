"""Public objects in a prompt or a log: one line each, however much they hold."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import shardlens
from shardlens.interp import MULTIPLIERS, encode_pairs
from shardlens.model import DEMO

PROMPT = "The capital of Norvia is\n\x1b[2J" * 20


@cache
def objects() -> dict[str, Any]:
    """One of each public kind, large."""
    lm = shardlens.load("demo")
    pairs = shardlens.read_pairs(DEMO / "dispositions-cautious-bold.jsonl")
    taps = [shardlens.Tap(layer, "mlp_out") for layer in range(6)]
    vectors = shardlens.SteeringVectors({tap: torch.ones(128) for tap in taps}, {}, n_layers=6)
    lens = shardlens.LensSpec(points=("attn_out", "resid_post"))
    result = lm.generate(PROMPT, max_new_tokens=9, lens=lens)
    report = shardlens.SteerabilityReport(
        protocol="paper",
        multipliers=list(MULTIPLIERS),
        taps=taps,
        propensities=np.zeros((6, 50, 7)),
        control=np.zeros((6, 50, 7)),
        baseline_accuracy=0.5,
        balance=0.5,
        form=" A",
        n_train=0,
        unit="vector",
        accessibility=None,
        suggested=None,
        warnings=["x" * 100],
        item_keys=tuple(pair.key for pair in pairs[:50]),
    )
    steering = [shardlens.Steering(vectors, positions=list(range(500)))] * 9
    return {
        "LensSpec": lens,
        "Pair": pairs[0],
        "PairIds": encode_pairs(lm.tokenizer, pairs[:1], shardlens.PromptForm())[0],
        "PromptForm": shardlens.PromptForm(chat=True, system=PROMPT, template={PROMPT: pairs}),
        "Request": shardlens.Request(result.trace.input_ids, steering=steering, stop=[PROMPT] * 9),
        "Result": result,
        "Sampling": shardlens.Sampling(0.5, top_p=0.9),
        "Steering": shardlens.Steering(torch.randn(8192)),
        "SteerabilityReport": report,
        "SteeringVectors": vectors,
        "Trace": result.trace,
        "Origin": dataclasses.replace(vectors.origin, pair_keys=report.item_keys),
    }


@pytest.mark.parametrize("name", objects())
def test_an_object_is_one_line(name: str) -> None:
    text = repr(objects()[name])
    assert text.startswith(f"{name}(") and text.endswith(")")
    assert len(text) < 160 and text.isprintable()


def test_lines_say_what_matters() -> None:
    texts = {name: repr(item) for name, item in objects().items()}
    assert texts["Trace"].startswith(
        "Trace(209 positions, 12 taps, attn_out of layer 0 to resid_post of layer 5, k 5, 'The cap"
    )
    assert texts["Steering"] == "Steering(vector=[8192] float32, point='resid_post')"
    assert texts["SteeringVectors"] == (
        "SteeringVectors(mlp_out of layers 0-5, d 128, for 6 layers)"
    )
    assert texts["SteerabilityReport"] == (
        "SteerabilityReport(paper, mlp_out of layers 0-5, 50 items, 7 multipliers)"
    )
    assert texts["Pair"].endswith("matching=' (A)', other=' (B)')")
    assert "… 210 in all]" in texts["Request"]
    assert repr(shardlens.PromptForm()) == "PromptForm()"

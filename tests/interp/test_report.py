"""The steerability report: its numbers, warnings, files, and what a terminal shows."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType
from tolerances import FLOAT64

from shardlens.interp import (
    MULTIPLIERS,
    SteerabilityReport,
    curve_table,
    difference,
    example_slopes,
    layer_map,
    slopes_table,
    summarize,
    summary_lines,
)
from shardlens.interp.report import check_format
from shardlens.model import Tap

SLOPES = (0.1, 0.4, 0.9, 0.6)  # mean slope made up for each of four layers


def made_up(**changes: Any) -> SteerabilityReport:
    """Layers 2 to 5 at mlp_norm and layer 3 at resid_post, 20 items; layer 4 steers best."""
    generator = np.random.default_rng(0)
    steps, taps = np.array(MULTIPLIERS), [Tap(layer, "mlp_norm") for layer in range(2, 6)]
    means = np.array([*SLOPES, 0.3])[:, None]
    starts = generator.normal(0, 2, (1, 20, 1))  # unsteered: the same at every tap
    slopes = means + generator.normal(0, 0.3, (5, 20))
    fields: dict[str, Any] = dict(
        protocol="paper",
        multipliers=list(MULTIPLIERS),
        taps=[*taps, Tap(3, "resid_post")],
        propensities=starts + slopes[..., None] * steps,
        control=starts + generator.normal(0, 0.05, (5, 20, 1)) * steps,
        baseline_accuracy=0.55,
        balance=0.5,
        form="A",
        n_train=40,
        unit="vector",
        accessibility=[0.0, 0.1, 0.2, 0.3, 0.8, 0.9],
        suggested=Tap(5, "mlp_norm"),
        warnings=[],
    )
    return SteerabilityReport(**{**fields, **changes})


def smallest() -> SteerabilityReport:
    """One tap, one item, two multipliers, neither of them 0."""
    return made_up(
        multipliers=[1.0, -0.5],
        taps=[Tap(0, "resid_post")],
        propensities=[[[4.0, 1.0]]],
        control=[[[2.5, 2.5]]],
        balance=None,
        n_train=0,
        accessibility=None,
        suggested=None,
    )


def shown(content: RenderableType, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(content)
    return capture.get()


def test_numbers_are_those_of_the_propensities() -> None:
    report = made_up()
    assert report.n_items == 20 and report.best == 2 and report.reference == 3
    content = report.to_dict()
    assert content["best"] == {"layer": 4, "point": "mlp_norm"}
    for index, tap in enumerate(content["taps"]):
        steered, control = report.propensities[index], report.control[index]
        assert Tap(tap["layer"], tap["point"]) == report.taps[index]
        for name, values in (("slope", steered), ("control_slope", control)):
            wanted = dataclasses.asdict(summarize(values, MULTIPLIERS))
            assert tap[name] == pytest.approx(wanted, abs=FLOAT64)
        wanted = dict(
            zip(("mean", "low", "high"), difference(steered, control, MULTIPLIERS), strict=True)
        )
        assert tap["difference"] == pytest.approx(wanted, abs=FLOAT64)
        assert tap["mean_curve"] == pytest.approx(steered.mean(axis=0).tolist(), abs=FLOAT64)
        assert tap["control_mean_curve"] == pytest.approx(control.mean(axis=0).tolist())
        slopes = example_slopes(steered, MULTIPLIERS).tolist()
        assert tap["example_slopes"] == pytest.approx(slopes, abs=FLOAT64)
        assert np.array(tap["propensities"]) == pytest.approx(steered, abs=1e-6)


def test_seed_is_that_of_the_bootstrap() -> None:
    many = np.tile(made_up().propensities, (1, 3, 1))
    report, other = (made_up(propensities=many, control=many, seed=seed) for seed in (0, 1))
    assert other.slopes[0].mean == report.slopes[0].mean
    assert other.slopes[0].low != report.slopes[0].low
    assert other.slopes[0].low == pytest.approx(
        summarize(report.propensities[0], MULTIPLIERS, seed=1).low, abs=FLOAT64
    )
    assert other.to_dict()["seed"] == 1


def test_suggestion_is_ranked_among_its_point() -> None:
    assert made_up().suggestion_rank() == (2, 4)
    assert made_up(suggested=Tap(2, "mlp_norm")).suggestion_rank() == (4, 4)
    assert made_up(suggested=Tap(3, "resid_post")).suggestion_rank() == (1, 1)
    assert made_up(suggested=Tap(0, "mlp_norm")).suggestion_rank() is None
    assert made_up(suggested=None).suggestion_rank() is None
    # over layers 2 to 5 accessibility ranks 1 2 3 4, slopes 1 2 4 3
    assert made_up().accessibility_spearman() == pytest.approx(0.8)
    assert made_up(suggested=Tap(3, "resid_post")).accessibility_spearman() is None
    assert smallest().accessibility_spearman() is None


def test_json_holds_the_same_numbers(tmp_path: Path) -> None:
    for report in (made_up(), smallest()):
        report.save(tmp_path / "report.json")
        assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    assert report.to_dict()["suggestion_rank"] is None
    assert made_up().to_dict()["suggestion_rank"] == {"rank": 2, "of": 4}


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    many = made_up(
        taps=[Tap(layer, "resid_pre") for layer in range(60)],
        propensities=np.random.default_rng(1).normal(size=(60, 200, 7)),
        control=np.zeros((60, 200, 7)),
        accessibility=None,
        suggested=Tap(59, "resid_pre"),
    )
    flat = made_up(propensities=np.ones((5, 20, 7)))
    for name, report in (
        ("usual", made_up()),
        ("small", smallest()),
        ("many", many),
        ("flat", flat),
    ):
        path = tmp_path / f"{name}.png"
        report.save(str(path))
        picture = imread(path)
        assert min(picture.shape[:2]) > 400
        assert picture[..., :3].std() > 0.05  # a blank page has 0
    assert len(list(tmp_path.iterdir())) == 4  # no partial file is left


def test_files_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"\.json, \.png"):
        made_up().save(tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="plot"):
        made_up().save(tmp_path / "report.png")
    with pytest.raises(ValueError, match="plot"):
        check_format(tmp_path / "report.png")
    check_format(tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(balance=0.83), "listed first in 83% of the items: a vector may steer the letter"),
        (dict(balance=0.2), "listed first in 20% of the items"),
        (dict(baseline_accuracy=0.97), "wins in 97% of the items: .* (ceiling)"),
        (dict(baseline_accuracy=0.02), "wins in 2% of the items: .* (floor)"),
    ],
)
def test_doubtful_items_are_warned_of(changes: dict[str, Any], words: str) -> None:
    report = made_up(**changes, warnings=["from before"])
    first, second = report.warnings
    assert first == "from before"
    for part in words.split(".*"):
        assert part.strip() in second
    assert f"warning: {second}" in summary_lines(report)
    assert dataclasses.replace(report).warnings == report.warnings


@pytest.mark.parametrize("n", [2, 9])
def test_few_items_are_warned_of(n: int) -> None:
    few = made_up().control[:, :n]
    (warning,) = made_up(propensities=few, control=few).warnings
    assert warning == (
        f"there are {n} items, and their intervals are right only if slopes of items are about "
        "gaussian: measure on 10 or more"
    )


def test_sound_items_are_not_warned_of() -> None:
    ten = made_up().control[:, :10]
    assert made_up(propensities=ten, control=ten).warnings == []
    for changes in (dict(balance=0.4), dict(balance=0.6), dict(balance=None)):
        assert made_up(**changes).warnings == []
    assert made_up(baseline_accuracy=0.95).warnings == []


def test_tables_show_the_numbers() -> None:
    report = made_up()
    best = report.slopes[2]
    rows = shown(slopes_table(report)).splitlines()
    (row,) = (row for row in rows if row.startswith("*"))
    assert row.split()[:3] == ["*", "4", "mlp_norm"]
    for number in (best.mean, best.low, best.high, report.control_slopes[2].mean):
        assert f"{number:+.3f}" in row
    assert [row.split()[1] for row in rows if row.startswith(">")] == ["5"]

    for width in (80, 100):
        assert "…" not in shown(slopes_table(report), width)

    curve = shown(curve_table(report, 2)).splitlines()
    assert "layer 4 mlp_norm" in curve[0]
    top = [f"{report.curves[2, -1]:+.3f}", f"{report.control_curves[2, -1]:+.3f}"]
    assert curve[-1].split() == ["1.5", *top]

    lines = shown(layer_map(report)).splitlines()
    assert "mlp_norm" in lines[0]
    layers = [line for line in lines if line.startswith("layer")]
    assert [line.split()[1] for line in layers] == ["5", "4", "3", "2"]
    change = report.curves[2] - report.curves[2, 3]
    assert layers[1].split()[2:] == [f"{value:+.2f}" for value in change]
    assert "resid_post" in shown(layer_map(report, "resid_post"))
    with pytest.raises(ValueError, match="attn_out"):
        layer_map(report, "attn_out")


def test_summary_is_in_words() -> None:
    report = made_up()
    slope, control = report.slopes[2], report.control_slopes[2]
    text = "\n".join(summary_lines(report))
    for part in (
        "protocol paper: 20 items, vectors from 40 pairs",
        "the token A;",
        "wins in 55% of the items; it is listed first in 50%",
        f"best of 5 taps: layer 4 mlp_norm, slope {slope.mean:+.3f} "
        f"(95% interval {slope.low:+.3f} to {slope.high:+.3f})",
        f"equal norm there: slope {control.mean:+.3f} (95%",
        f"larger by {report.differences[2][0]:+.3f} (95%",
        "number 2 of 4 by slope",
        "Spearman +0.80",
    ):
        assert part in text
    absent = made_up(suggested=Tap(0, "mlp_norm"))
    assert any("which was not steered" in line for line in summary_lines(absent))


def test_the_smallest_report_is_shown() -> None:
    """Propensity 4 at multiplier 1 and 1 at -0.5: slope 2, and neither spread nor interval."""
    report = smallest()
    assert report.warnings == ["there is 1 item, and no interval: measure on 10 or more"]
    (tap,) = report.to_dict()["taps"]
    for part in (tap["slope"], tap["control_slope"], tap["difference"]):
        assert part["low"] is part["high"] is None and part["mean"] is not None
    assert tap["slope"]["std"] is None
    assert shown(curve_table(report, 0)).splitlines()[-2].split() == ["1", "+4.000", "+2.500"]
    row = shown(slopes_table(report)).splitlines()[-1].split()
    assert row == ["*", "0", "resid_post", "+2.000", "-", "-", "0%", "+1.00", "1.00", "+0.000", "-"]
    # no multiplier is 0: the one nearest is -0.5
    assert shown(layer_map(report)).splitlines()[-1].split()[2:] == ["+3.00", "+0.00"]
    text = "\n".join(summary_lines(report))
    assert "1 item;" in text and "slope +2.000 (95% interval -); standard deviation -" in text
    assert "listed first" not in text and "suggested" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(protocol="other"), "steering-bench"),
        (dict(unit="metre"), "resid_norm"),
        (dict(taps=[]), "at least 1 tap"),
        (dict(taps=[Tap(1, "mlp_norm")] * 5), "only once"),
        (dict(multipliers=[0.0, 1.0]), r"\[5, 20, 7\]: .* need \[5, 20, 2\]"),
        (dict(multipliers=[1.0] * 7), "different multipliers"),
        (dict(control=np.zeros((5, 19, 7))), "control"),
        (dict(control=np.full((5, 20, 7), math.nan)), "control .* not finite"),
        (dict(propensities=np.zeros((5, 0, 7)), control=np.zeros((5, 0, 7))), "1 example"),
        (dict(balance=math.nan), "balance"),
        (dict(baseline_accuracy=1.2), "baseline_accuracy"),
        (dict(accessibility=[0.0]), "layer 5 was steered"),
        (dict(accessibility=[math.nan] * 6), "accessibility"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        made_up(**changes)
    assert "\n" not in str(error.value)

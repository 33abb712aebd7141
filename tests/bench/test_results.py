"""The committed results, and how they are laid out: figures stand beside their names."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from shardlens.bench.kernel_report import COLUMNS
from shardlens.bench.report import RESULTS
from shardlens.engine import json_text, write_json

LONE_NUMBER = re.compile(r"^\s*-?\d[\d.eE+-]*,?$", re.MULTILINE)
CONTENT = {
    "name": "ü",
    "rows": [[1, 2.5], [3, -4e-7]],
    "flat": [1, None, "a", True],
    "mixed": [1, {"deep": [0.5, 1.5]}, []],
    "none": {},
    3: (1, 2),
}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_no_line_of_a_result_holds_only_a_number(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not LONE_NUMBER.search(text)
    assert text == json_text(json.loads(text)) + "\n"


def test_the_results_are_there() -> None:
    names = {path.stem for path in RESULTS.glob("*.json")}
    assert {"compiled", "cpu", "head-cpu", "kernels-cpu", "scaling", "steer-sweep"} <= names
    assert LONE_NUMBER.search(json.dumps({"figures": [1.5, -2e-3]}, indent=1))


def test_csv_has_the_columns_of_today() -> None:
    with (RESULTS / "kernels-cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(list(row) == COLUMNS for row in rows)
    by_impl = json.loads((RESULTS / "kernels-cpu.json").read_text())["cases"]
    for row in rows:
        case = " ".join(filter(None, (row["op"], row["variant"], row["shape"])))
        assert by_impl[case]["p50_ms"][row["impl"]] == float(row["p50_ms"])


def test_arrays_of_plain_values_are_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, CONTENT)  # type: ignore[arg-type]
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(CONTENT))
    lines = text.splitlines()
    assert ' "flat": [1, null, "a", true],' in lines and "  [1, 2.5]," in lines
    assert '   "deep": [0.5, 1.5]' in lines and ' "none": {},' in lines


@pytest.mark.parametrize("value", [math.nan, [math.inf], {"a": [[math.nan]]}])
def test_what_json_has_no_number_for_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"value": value})
    assert list(tmp_path.iterdir()) == []


def test_what_a_monitor_costs() -> None:
    """The committed figures are within their bounds, and README quotes them."""
    found = json.loads((RESULTS / "monitor.json").read_text(encoding="utf-8"))
    assert found["steps_each"] >= 300 and found["looks"] >= 30
    assert found["share_added_by_calls"] < 0.005
    assert found["share_added_without_looks"] < 0.005
    assert found["share_added_by_1_look_in_100"] < 0.02
    assert found["loss_off_full_logits_nats"] < 1e-5
    readme = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    said = re.search(
        r"adds ([\d.]+) µs to a step of ([\d.]+) s[^%]*?adds ([\d.]+)%", " ".join(readme.split())
    )
    assert said is not None
    call_us = found["call_not_looked_at_us"] * found["shape"]["micro_batches"]
    assert said[1] == f"{call_us:.1f}"
    assert said[2] == f"{found['step_ms']['without']['p50'] / 1e3:.2f}"
    assert said[3] == f"{found['share_added_by_1_look_in_100']:.2%}"[:-1]

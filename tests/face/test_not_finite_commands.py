"""Every command refuses numbers that are not finite in a line, and leaves no file."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from checkpoints import change_tensors
from launching import launch

from shardlens.cli import main
from shardlens.model import DEMO

TENSOR = "model.layers.3.self_attn.o_proj.weight"
NAMED = f"{TENSOR} holds NaN or infinity on rank "
PAIRS = DEMO / "dispositions-cautious-bold.jsonl"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model with a weight of NaN in the second half of a row."""
    directory = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(DEMO, directory)
    change_tensors(directory, lambda tensors: tensors[TENSOR].__setitem__((3, -1), math.nan))
    return directory


def words_of(directory: Path, out: Path) -> dict[str, list[str]]:
    prompt = ["--prompt", "Anna is"]
    few = out / "few.jsonl"
    few.write_text("".join(PAIRS.read_text().splitlines(keepends=True)[:6]))
    pairs, json_out = ["--pairs", str(few)], ["--json", str(out / "out.json")]
    made, model = ["--out", str(out / "made.safetensors")], str(directory)
    pages = ["--out", str(out / "page.html"), "--out", str(out / "trace.json")]
    return {
        "lens": ["lens", model, *prompt, *json_out, *pages],
        "lens of a continuation": [
            *["lens", model, *prompt, "--max-new-tokens", "4", "--positions", "generated"],
            *["--layers", "0", "--points", "mlp_norm,mlp_out", *json_out, *pages],
        ],
        "generate": ["generate", model, *prompt, *json_out, *pages],
        "extract": ["steer", "extract", model, *pairs, *json_out, *made],
        "eval": ["steer", "eval", model, *pairs, *json_out, "--png", str(out / "x.png")],
    }


@pytest.mark.parametrize(
    "command", ["lens", "lens of a continuation", "generate", "extract", "eval"]
)
def test_a_broken_weight(
    command: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(broken, tmp_path)[command]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shardlens: ") and f" not finite: {NAMED}0: " in line
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]


def test_a_steered_text_beyond_float16(
    vector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = ["--vector", str(vector), "--prompt", "Anna is", "--scale", "1", "9e4"]
    more = ["--dtype", "float16", "--max-new-tokens", "3", "--json", str(out)]
    assert main(["steer", "generate", "demo", *words, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "of prompt 2 are not finite: the edit at resid_post of layer 1, mode add, scale " in line
    assert "90000, takes states beyond the range of float16" in line and not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["lens", "generate", "extract"])
def test_a_broken_weight_on_real_ranks(command: str, broken: Path, tmp_path: Path) -> None:
    """It lies in the last rank's slice, and rank 0 says so."""
    run = launch("-n", "2", *words_of(broken, tmp_path)[command])
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("shardlens: ") and f" not finite: {NAMED}1: " in line
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]

"""The commands as a user types them: output, exit codes, bad input, several ranks, a dead rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import LAUNCH, launch

import shardlens
from shardlens.cli import main
from shardlens.model import Tap

PROMPT = "Once upon a time"


@pytest.fixture
def broken(stories: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in stories.iterdir():
        shutil.copyfile(file, directory / file.name)
    return directory


def test_lens_prints_a_table_of_at_most_100_columns(
    stories: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "lens.json"
    words = ["lens", str(stories), "--prompt", PROMPT, "--max-new-tokens", "12", "--top-k", "2"]
    assert (
        main([*words, "--json", str(out), "--layers", "0,-1", "--points", "mlp_out,resid_post"])
        == 0
    )
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "4 resid_post" in printed and "0 mlp_out" in printed and "·there" in printed
    content = json.loads(out.read_text())
    assert content["taps"] == [[0, "mlp_out"], [0, "resid_post"], [4, "mlp_out"], [4, "resid_post"]]
    assert content["text"].startswith(", there was")
    assert len(content["token_ids"][0][0]) == 2


def test_a_trace_has_one_format(stories: Path, tmp_path: Path) -> None:
    """By --json, --out and in Python, whatever the command; all are read back alike."""
    lens, out, saved, again = (tmp_path / f"{name}.json" for name in "abcd")
    words = ["--prompt", PROMPT, "--max-new-tokens", "4"]
    assert main(["lens", str(stories), *words, "--json", str(lens), "--out", str(out)]) == 0
    assert main(["generate", str(stories), *words, "--out", str(again)]) == 0
    lm = shardlens.load(stories)
    trace = lm.generate(PROMPT, max_new_tokens=4, lens=shardlens.LensSpec()).trace
    assert trace is not None and (trace.prompt, trace.text) == (PROMPT, ", there was a")
    trace.save(saved)
    assert lens.read_bytes() == out.read_bytes() == saved.read_bytes() == again.read_bytes()
    for found in (
        shardlens.Trace.load(lens),
        shardlens.Trace.from_dict(json.loads(lens.read_text())),
    ):
        assert found.to_dict() == trace.to_dict()
        assert torch.equal(found.logprobs, trace.logprobs) and found.prompt == PROMPT


def test_lens_target_and_positions(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lens.json"
    words = ["lens", str(stories), "--prompt", PROMPT, "--json", str(out)]
    assert main([*words, "--target", "there", "--positions", "last"]) == 0
    content = json.loads(out.read_text())
    assert len(content["positions"]) == 1
    assert content["names"][str(content["targets"][0])] == " there"


def test_generate_streams_text_and_writes_files(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trace = tmp_path / "text.json", tmp_path / "trace.html"
    words = ["generate", str(stories), "--prompt", PROMPT, "--max-new-tokens", "20"]
    assert main([*words, "--json", str(out), "--out", str(trace)]) == 0
    content = json.loads(out.read_text())
    assert (
        capsys.readouterr().out.replace("\n", " ")
        == PROMPT + content["text"].replace("\n", " ") + " "
    )
    assert len(content["token_ids"]) == 20 and trace.stat().st_size > 1000
    assert main([*words, "--temperature", "1", "--seed", "3", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["text"] != content["text"]


@pytest.mark.parametrize(
    "command", [["generate"], ["lens"], ["steer", "generate", "--vector", "VECTOR"]]
)
def test_eager_turns_capture_off_and_changes_nothing(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vector = tmp_path / "v.safetensors"
    shardlens.SteeringVectors({Tap(1, "resid_post"): torch.ones(128)}, {}, n_layers=6).save(vector)
    generate, captures = shardlens.LanguageModel.generate, []

    def called(*arguments: Any, **options: Any) -> Any:
        captures.append(options["capture"])
        return generate(*arguments, **options)

    monkeypatch.setattr(shardlens.LanguageModel, "generate", called)
    words = [word.replace("VECTOR", str(vector)) for word in command]
    words += ["demo", "--prompt", "Anna is", "--max-new-tokens", "5"]
    printed = []
    for more in ([], ["--eager"]):
        assert main([*words, *more]) == 0
        printed.append(capsys.readouterr().out)
    assert captures == [True, False] and printed[0] == printed[1] != ""


BAD = {
    "no such directory": (["lens", "/no/such/dir", "--prompt", "a"], "/no/such/dir"),
    "layer": (["lens", "MODEL", "--prompt", "a", "--layers", "99"], "layer 99 does not exist"),
    "point": (["lens", "MODEL", "--prompt", "a", "--points", "residual"], "residual"),
    "top-k": (["lens", "MODEL", "--prompt", "a", "--top-k", "0"], "top_k 0"),
    "target": (["lens", "MODEL", "--prompt", "a", "--target", "two words"], "'two words'"),
    "empty prompt": (["lens", "MODEL", "--prompt", ""], "prompt is empty"),
    "long prompt": (["generate", "MODEL", "--prompt", "a b " * 300], "context of 512"),
    "too many new": (["generate", "MODEL", "--prompt", "a", "--max-new-tokens", "512"], "context"),
    "no chat": (["generate", "MODEL", "--prompt", "a", "--chat"], "no chat template"),
    "sampling": (["generate", "MODEL", "--prompt", "a", "--top-p", "2"], "top_p"),
    "flag": (["generate", "MODEL", "--prompt", "a", "--tmperature", "2"], "--tmperature"),
    "command": (["look"], "look"),
    "no folder": (["lens", "MODEL", "--prompt", "a", "--json", "/no/folder/x.json"], "/no/folder"),
    "format": (["lens", "MODEL", "--prompt", "a", "--out", "x.csv"], "x.csv"),
    "kernels": (["lens", "MODEL", "--prompt", "a", "--kernels", "cuda"], "cuda"),
    "device": (["lens", "MODEL", "--prompt", "a", "--device", "tpu"], "tpu"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_one_line_and_exit_2(
    name: str,
    stories: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words, says = BAD[name]
    out = [] if "--json" in words or len(words) < 2 else ["--json", "out.json"]
    assert main([word.replace("MODEL", str(stories)) for word in words] + out) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("shardlens: ") and says in lines[0]
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == [], "no file is left, whole or partial"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("name", ["truncated", "tensor missing", "architecture", "layers", "empty"])
def test_bad_input_under_the_launcher(name: str, ranks: str, broken: Path, tmp_path: Path) -> None:
    """One line, exit 2, no stack trace, no file, on every rank count."""
    words, says = ["--prompt", PROMPT], "?"
    if name == "truncated":
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5000])
        says = "not a whole safetensors file"
    elif name == "tensor missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(broken / "model.safetensors")
        del tensors["model.layers.3.mlp.up_proj.weight"]
        save_file(tensors, broken / "model.safetensors")
        says = "lacks tensor model.layers.3.mlp.up_proj.weight"
    elif name == "architecture":
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHead"]}))
        says = "'GPT2LMHead' is not supported"
    elif name == "layers":
        words, says = [*words, "--layers", "99"], "layer 99 does not exist"
    else:
        words, says = ["--prompt", ""], "prompt is empty"
    out = tmp_path / "out.json"
    run = launch("-n", ranks, "lens", str(broken), *words, "--json", str(out))
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith("shardlens: ") and says in line
    assert run.stdout == "" and not out.exists()


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_heads(stories: Path) -> None:
    """8 heads and 4 kv heads on 3 ranks print the table of one rank."""
    alone, shared = (
        launch("-n", ranks, "lens", str(stories), "--prompt", PROMPT) for ranks in ("1", "3")
    )
    assert (alone.returncode, shared.returncode) == (0, 0), shared.stderr
    assert alone.stdout == shared.stdout != ""


@pytest.mark.slow
def test_real_ranks_say_the_same(stories: Path, tmp_path: Path) -> None:
    """gloo over torchrun, 1 and 2 processes: the same sampled text, and what was sent."""
    contents = []
    for ranks in ("1", "2"):
        out = tmp_path / f"{ranks}.json"
        sampling = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "11"]
        words = ["generate", str(stories), "--prompt", PROMPT, "--max-new-tokens", "25", *sampling]
        run = launch("-n", ranks, *words, "--json", str(out))
        assert run.returncode == 0, run.stderr
        contents.append(json.loads(out.read_text()))
        assert run.stdout == PROMPT + contents[-1]["text"] + "\n"
    assert contents[0]["token_ids"] == contents[1]["token_ids"]
    assert contents[0]["sent_bytes"] == {} and contents[1]["sent_bytes"]["all_gather"] > 0


@pytest.mark.slow
def test_a_killed_rank_ends_the_run(stories: Path) -> None:
    """kill -9 of one rank in the middle of generation: an error within 60 seconds."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    marker = f"SHARDLENS_TEST_RUN={os.getpid()}"
    words = ["-n", "2", "generate", str(stories), "--prompt", PROMPT, "--max-new-tokens", "480"]
    run = subprocess.Popen(
        [str(LAUNCH), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PATH": path, "SHARDLENS_TEST_RUN": str(os.getpid())},
        start_new_session=True,
    )
    assert run.stdout is not None
    try:
        first = os.read(run.stdout.fileno(), 1)
        assert first, "the run ended before it printed anything"
        victim = rank_pid(marker, rank=1)
        start = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        assert run.wait(timeout=60) not in (0, 2)
        assert time.monotonic() - start < 60
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()
        assert run.stderr is not None
        run.stderr.close()


def rank_pid(marker: str, rank: int) -> int:
    """The process of a rank, among those that carry `marker` in their environment."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if marker.encode() in environment and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")

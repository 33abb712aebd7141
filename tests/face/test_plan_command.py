"""`plan` as a user types it, runs refused for want of memory, and what is imported for neither."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from oracles import LLAMA_405B

from shardlens import cli
from shardlens.cli import main
from shardlens.engine import GPUS


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A directory with a config.json alone."""
    directory = tmp_path / "Llama-3.1-405B"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_405B))
    return directory


def planned(*words: str, out: Path) -> dict[str, Any]:
    assert main(["plan", *words, "--json", str(out)]) == 0
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_a_row_for_every_rank_count(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(big), "--ranks", "4,8,64", "--context", "8192"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == "" and lines[0] == str(big)
    assert max(map(len, lines[1:])) <= 100
    rows = {line.split()[0]: line.split() for line in lines if line.strip()[:1].isdigit()}
    assert [rows[ranks][8] for ranks in ("4", "8", "64")] == ["no", "yes", "yes"]
    assert rows["8"][1] == "94.5" and lines[-1] == "fewest ranks that fit: 6"


def test_json_holds_the_numbers(big: Path, tmp_path: Path) -> None:
    words = [str(big), "--ranks", "16,1024", "--context", "8192", "--batch", "3", "--gpu", "h100"]
    content = planned(*words, out=tmp_path / "plan.json")
    possible, many = content["plans"]
    assert content["gpu"] == {
        "name": "h100",
        "memory_gib": 80,
        "bandwidth_bytes_per_s": GPUS["h100"].bandwidth_bytes_per_s,
    }
    assert (content["context"], content["batch"], content["taps"]) == (8192, 3, 126)
    assert content["fewest_ranks"] == 11 and content["dtype"] == "bfloat16"
    within = {"total_bytes", "padding_bytes"}  # the latter is a part of weights and cache
    parts = [name for name in possible if name.endswith("_bytes") and name not in within]
    assert possible["total_bytes"] == sum(possible[name] for name in parts)
    assert possible["fits"] is True and possible["cache_bytes"] == 2 * 126 * 4 * 8192 * 128 * 2
    rate = 3 * 3.35e12 / possible["moved_bytes_per_token"]
    assert possible["tokens_per_s"] == pytest.approx(rate)
    assert (many["ranks"], many["ranks_per_group"], many["fits"]) == (1024, 128, True)
    rate = 8 * 3 * 3.35e12 / many["moved_bytes_per_token"]
    assert many["tokens_per_s"] == pytest.approx(rate)


def test_padding_of_heads_is_shown(
    big: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, out = [str(big), "--context", "512"], tmp_path / "plan.json"
    even, uneven = planned(*words, "--ranks", "16,11", out=out)["plans"]
    assert even["padding_bytes"] == 0
    # 128 query heads are 11.6 for each of 11 ranks, 8 kv heads 0.7: the fullest holds 12 and 3
    attention = 126 * 2 * 16384 * 128 * (12 + 3 - 128 / 11 - 1) * 2
    cache = 126 * 2 * 512 * 128 * (3 - 1) * 2
    assert uneven["padding_bytes"] == pytest.approx(attention + cache, rel=0.02)
    share = uneven["padding_bytes"] / (uneven["weights_bytes"] + uneven["cache_bytes"])
    shown = f"11 ranks do not divide the model: {share:.1%} of the weights and cache"
    assert shown in " ".join(capsys.readouterr().out.split())


def test_points_and_layers_are_counted(big: Path, tmp_path: Path) -> None:
    words, out = [str(big), "--ranks", "8", "--context", "512"], tmp_path / "plan.json"
    taps = {
        ("--points", "none"): 0,
        ("--points", "mlp_out,resid_post"): 252,
        ("--layers", "0-2,-1"): 4,
        ("--layers", "0-2"): 4,  # and the final layer's, which is always decoded
        ("--points", "mlp_out", "--layers", "5"): 2,
    }
    for more, expected in taps.items():
        assert planned(*words, *more, out=out)["taps"] == expected, more


def test_model_is_a_directory_a_file_or_the_demo(big: Path, tmp_path: Path) -> None:
    words, out = ["--ranks", "2", "--context", "64"], tmp_path / "plan.json"
    of_file = planned(str(big / "config.json"), *words, out=out)["plans"]
    assert of_file == planned(str(big), *words, out=out)["plans"]
    demo = planned("demo", *words, "--dtype", "float32", out=out)["plans"][0]
    assert demo["weights_bytes"] < 4 * 1_050_240 < 2.2 * demo["weights_bytes"]


def test_of_a_hub_id_only_the_config_is_fetched(
    big: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked = []

    def hf_hub_download(hub_id: str, file: str, *, revision: str | None) -> str:
        asked.append((hub_id, file))
        return str(big / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    planned("meta/Llama", "--ranks", "8", "--context", "64", out=tmp_path / "plan.json")
    assert asked == [("meta/Llama", "config.json")]


BAD = {
    "no such model": (["/no/such/dir", "--ranks", "8"], "/no/such/dir is not a directory"),
    "no config": (["FOLDER", "--ranks", "8"], "config.json does not exist"),
    "all ranks": (["MODEL", "--ranks", "0,-3"], "ranks 0 is below 1"),
    "rank words": (["MODEL", "--ranks", "8,many"], "'8,many' cannot be read"),
    "no ranks": (["MODEL"], "--ranks"),
    "context": (["MODEL", "--ranks", "8", "--context", "131073"], "context of 131072"),
    "batch": (["MODEL", "--ranks", "8", "--batch", "0"], "batch 0"),
    "top-k": (["MODEL", "--ranks", "8", "--top-k", "0"], "top_k 0"),
    "point": (["MODEL", "--ranks", "8", "--points", "residual"], "point residual"),
    "layer": (["MODEL", "--ranks", "8", "--layers", "126"], "layer 126 does not exist"),
    "gpu": (["MODEL", "--ranks", "8", "--gpu", "h1000"], "h1000"),
    "memory": (["MODEL", "--ranks", "8", "--gpu-memory", "-1"], "--gpu-memory -1"),
    "no folder": (["MODEL", "--ranks", "8", "--json", "/no/folder/x.json"], "/no/folder"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_one_line_and_exit_2(
    name: str, big: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, says = BAD[name]
    words = [{"MODEL": str(big), "FOLDER": str(tmp_path)}.get(word, word) for word in words]
    context = [] if "--context" in words else ["--context", "64"]
    out = [] if "--json" in words else ["--json", str(tmp_path / "out.json")]
    assert main(["plan", *words, *context, *out]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("shardlens: ") and says in line and printed.out == ""
    assert not (tmp_path / "out.json").exists()


def test_other_ranks_are_silent(
    big: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "plan.json"
    assert main(["plan", str(big), "--ranks", "8", "--context", "64", "--json", str(out)]) == 0
    assert main(["plan", str(big), "--ranks", "0", "--context", "64"]) == 2
    printed = capsys.readouterr()
    assert printed.out == printed.err == "" and not out.exists()


@pytest.mark.parametrize("command", ["lens", "generate"])
@pytest.mark.parametrize("tapped", [False, True])
def test_a_run_that_does_not_fit_is_refused_before_weights_are_read(
    command: str,
    tapped: bool,
    stories: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from shardlens import session
    from shardlens.model import load as load_module

    def read_weights(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(load_module, "load_weights", read_weights)
    monkeypatch.setattr(session, "device_memory_bytes", lambda device: 2**20)
    words = [command, str(stories), "--prompt", "Once", "--device", "cpu"]
    words += ["--max-new-tokens", "100"] if command == "generate" else []
    words += ["--out", str(tmp_path / "trace.json")] if tapped else []
    assert main(words) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert f"{stories} does not fit: it needs" in line and "the machine has free for it" in line
    assert ("fewer layers" in line) and printed.out == "" and not list(tmp_path.iterdir())
    monkeypatch.setattr(session, "device_memory_bytes", lambda device: 2**40)
    with pytest.raises(AssertionError, match="weights are read"):
        main(words)


@pytest.mark.parametrize(
    "words, captures",
    [
        (["generate", "--max-new-tokens", "9"], True),
        (["generate", "--max-new-tokens", "9", "--eager"], False),
        (["generate", "--max-new-tokens", "1"], False),  # which the prompt's own pass gives
        (["lens"], False),
        (["lens", "--max-new-tokens", "9"], True),
    ],
)
def test_memory_of_a_graph_is_asked_for_where_there_is_one(
    words: list[str], captures: bool, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardlens.engine import fit

    asked = []

    def plan(*arguments: Any, capture: bool, **options: Any) -> Any:
        asked.append(capture)
        return original(*arguments, capture=capture, **options)

    original = fit.plan
    monkeypatch.setattr(fit, "plan", plan)
    assert main([words[0], str(stories), "--prompt", "Once", "--device", "cpu", *words[1:]]) == 0
    assert asked == [captures]


ROOMS = ("engine", "interp", "kernels", "model", "parallel", "tokenizer")
PROGRAM = """
import sys
from shardlens.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


def test_a_plan_never_waits_for_torch(big: Path) -> None:
    """Seconds, on many machines. The limit is for a busy one: a tenth of it is usual."""
    words = ["plan", str(big), "--ranks", "16,64,1024", "--context", "8192"]
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert time.perf_counter() - start < 3
    assert "47.7" in run.stdout and "8 groups of 128 each hold the model" in run.stdout


def test_help_lists_all_commands_without_torch() -> None:
    program = PROGRAM.replace("main(sys.argv[1:])", "0") + "build_parser().print_help()"
    program = program.replace("import main", "import build_parser").replace("sys.exit(code)", "")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name, what in cli.COMMANDS.items():
        assert name in run.stdout and what in run.stdout


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_help_says_the_same_of_a_command_asked_for(name: str) -> None:
    assert cli.build_parser(name).format_help() == cli.build_parser().format_help()

"""Traces: their files, tables and pictures hold the numbers."""

from __future__ import annotations

import math
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from shardlens.interp import Trace, print_trace
from shardlens.model import Tap

T, P, K = 3, 2, 4
TAPS = (Tap(0, "mlp_out"), Tap(1, "resid_post"))
NAMES = {0: " Lily", 1: "\n", 2: "a\x1b[2Jb", 3: "<b>$x", 4: "so", 5: "\u202eevil"}


def made(n_positions: int = T) -> Trace:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_positions, P, 6, generator=generator)
    best = logits.log_softmax(-1).topk(K)
    targets = torch.tensor([index % 6 for index in range(n_positions - 1)] + [-1])

    def floats() -> Tensor:
        return torch.rand(n_positions, P, generator=generator)

    no_target = (targets < 0)[:, None]
    return Trace(
        taps=TAPS,
        positions=torch.arange(n_positions),
        targets=targets,
        token_ids=best.indices,
        logprobs=best.values,
        entropy=floats(),
        target_logprob=(-floats()).masked_fill(no_target, math.nan),
        target_rank=torch.ones(n_positions, P, dtype=torch.int64).masked_fill(no_target, -1),
        kl_to_final=floats(),
        input_ids=[index % 6 for index in range(n_positions)],
        names=NAMES,
        prompt="Lily\x1b",
        text="",
    )


def assert_same(found: Trace, expected: Trace) -> None:
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, Tensor):
            assert other.dtype == value.dtype and other.shape == value.shape
            assert torch.equal(other.nan_to_num(7), value.nan_to_num(7))
        else:
            assert other == value


@pytest.mark.parametrize("trace", [made(), made(1)], ids=["some", "one"])
def test_json_is_read_back(trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace.json")
    assert_same(Trace.load(str(tmp_path / "trace.json")), trace)


def test_a_trace_is_one_line() -> None:
    assert repr(made()) == (
        "Trace(3 positions, 2 taps, mlp_out of layer 0 to resid_post of layer 1, k 4, 'Lily\\x1b')"
    )
    piece = replace(made(1), taps=TAPS[:1], prompt=None, input_ids=[])
    assert repr(piece) == "Trace(1 position, 1 tap, mlp_out of layer 0, k 4)"
    assert repr(replace(made(), prompt=None)).endswith(r"k 4, ' Lily\na\x1b[2Jb')")


def test_a_piece_without_its_text_is_shown(tmp_path: Path) -> None:
    replace(made(), input_ids=[]).save(tmp_path / "piece.html")
    assert (tmp_path / "piece.html").stat().st_size > 1000


def test_an_empty_trace_is_read_back(tmp_path: Path) -> None:
    empty = Trace.empty(TAPS, K)
    assert empty.token_ids.shape == (0, P, K)
    empty.save(tmp_path / "trace.json")
    found = Trace.load(tmp_path / "trace.json")
    assert found.taps == TAPS and found.positions.shape == (0,)
    assert found.entropy.shape == (0, P) and found.token_ids.shape[:2] == (0, P)


def test_a_table_has_a_row_per_position_tap_and_candidate(tmp_path: Path) -> None:
    from pyarrow import parquet

    trace = made()
    trace.save(tmp_path / "trace.parquet")
    columns = parquet.read_table(tmp_path / "trace.parquet").to_pydict()
    assert list(columns) == list(trace.columns())
    row = 0
    for position in range(T):
        for tap in range(P):
            for candidate in range(K):
                found = {name: values[row] for name, values in columns.items()}
                assert (found["position"], found["candidate"]) == (position, candidate)
                assert Tap(found["layer"], found["point"]) == TAPS[tap]
                assert found["token_id"] == trace.token_ids[position, tap, candidate]
                assert found["token"] == NAMES[found["token_id"]]
                assert found["logprob"] == float(trace.logprobs[position, tap, candidate])
                for name in ("entropy", "kl_to_final", "target_rank"):
                    assert found[name] == float(getattr(trace, name)[position, tap])
                assert found["target"] == trace.targets[position]
                assert math.isnan(found["target_logprob"]) == (found["target"] == -1)
                row += 1
    assert row == len(columns["token"])


@pytest.mark.parametrize("ending", ["json", "html", "png", "parquet"])
def test_a_fifo_is_given_the_whole_file(ending: str, tmp_path: Path) -> None:
    path, fifo, found = tmp_path / f"x.{ending}", tmp_path / f"fifo.{ending}", []
    made().save(path)
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    reader.start()
    made().save(fifo)
    reader.join(20)
    assert found == [path.read_bytes()] and fifo.is_fifo()


def test_pandas_is_given_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert made().to_pandas() == list(made().columns())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=r"to_pandas needs pandas: pip install"):
        made().to_pandas()


def test_pictures_and_pages(tmp_path: Path) -> None:
    made().save(tmp_path / "trace.png")
    made(80).save(tmp_path / "long.png")  # more positions than a picture has room to name
    for name in ("trace", "long"):
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
    made().save(tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert "·Lily" in page and "⏎" in page and "&lt;b&gt;$x" in page and "<b>" not in page
    assert page.count("<td") == T * (P + 2)
    rank = f"target: rank 1, probability {made().target_logprob[0, 0].exp():.4f}"
    assert rank in page and page.count("target: rank") == (T - 1) * P
    with pytest.raises(ValueError, match=r"trace\.csv: a trace is written as \.json"):
        made().save(tmp_path / "trace.csv")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_terminal_shows_no_control_characters() -> None:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        print_trace(made(6), console)
    shown = capture.get()
    assert "\x1b" not in shown and "\u202e" not in shown
    assert "a<1B>[2Jb" in shown and "<202E>" in shown and "·Lily" in shown
    assert [line.split()[1] for line in shown.splitlines() if "mlp_out" in line] == ["mlp_out"]

"""Texts that would command a terminal, a page or a picture: shown as text, kept exactly in JSON."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import re
import sys
import termios
import threading
import tty
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

import shardlens
from shardlens.cli import main
from shardlens.interp import print_trace
from shardlens.model import Tap

TEXTS = [
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[31mred",
    "\x1bP+q\x1b\\",
    "\x9b31m \x85",
    "bell\x07 back\b\b\bxx",
    "safe\rEVIL",
    "\x00\x0b\x0c\x7f",
    "a\tb\n\nc\r\nd",
    "  outer  ",
    "\u202etxt.exe\u202c",
    "\u2066a\u2067b\u2069",
    "\u200e\u200f\u061c",
    "zero\u200bwidth\u200d\ufeff\u00ad",
    "tag\U000e0041\U000e007f",
    "line\u2028paragraph\u2029end",
    "\udcd7\udcff",
    "\ud800 half",
    "[red]no markup[/red] [/] [link=x]",
    ":bomb: :smile:",
    "\\[bold] \\",
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)" x="',
    "</td></table><img src=//x onerror=alert(1)>",
    "<!-- ]]> &lt;b&gt; &#27; &amp;",
    "<style>@import 'x'</style><base href=//x>",
    "$x^2$ \\$ $\\frac{1}{",
    "日本語のテキスト",
    "👩‍💻🦙 emoji ✈️",
    "e" + "\u0301" * 20,
    "x" * 500 + "{0} %s {title}",
]
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
TAPS = (Tap(0, "resid_post"), Tap(1, "resid_post"))
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # what rich itself may send


def hidden_in(text: str, *, but: str = "") -> set[str]:
    return {c for c in text if unicodedata.category(c) in HIDDEN} - set(but)


def traced(texts: list[str]) -> shardlens.Trace:
    """A trace at whose positions and in whose cells the texts are tokens."""
    n, k = len(texts), 3
    ids = torch.arange(n)[:, None, None] + torch.arange(k)
    return shardlens.Trace(
        taps=TAPS,
        positions=torch.arange(n),
        targets=torch.arange(n),
        token_ids=(ids % n).expand(n, 2, k).contiguous(),
        logprobs=torch.tensor([-0.1, -3.0, -4.0]).expand(n, 2, k).contiguous(),
        entropy=torch.zeros(n, 2),
        target_logprob=torch.full((n, 2), -0.1),
        target_rank=torch.zeros(n, 2, dtype=torch.int64),
        kl_to_final=torch.zeros(n, 2),
        input_ids=list(range(n)),
        names=dict(enumerate(texts)),
    )


@contextmanager
def pseudo_terminal() -> Iterator[tuple[io.TextIOWrapper, list[bytes]]]:
    """A terminal to write to, and what arrives there, byte by byte, once it is closed."""
    reading, writing = pty.openpty()
    tty.setraw(writing, termios.TCSANOW)  # or line breaks would become two characters
    found: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(reading, 65536):
                found.append(part)
        except OSError:  # how a closed pseudo-terminal ends
            pass

    reader = threading.Thread(target=read)
    reader.start()
    terminal = os.fdopen(writing, "w", encoding="utf-8")
    try:
        yield terminal, found
    finally:
        terminal.close()
        reader.join(20)
        os.close(reading)


def test_there_are_thirty() -> None:
    assert len(TEXTS) == len(set(TEXTS)) == 30


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_table_on_a_terminal(text: str) -> None:
    """Columns stay in line, whatever the width of characters."""
    with pseudo_terminal() as (terminal, found):
        print_trace(traced([text, "plain"]), Console(file=terminal, width=100))
    shown = b"".join(found).decode("utf-8")
    assert "\x1b[" in shown, "the table is coloured"
    shown = COLOURS.sub("", shown)
    assert not hidden_in(shown, but="\n")
    lines = shown.splitlines()
    assert {cell_len(line) for line in lines} == {cell_len(lines[0])}
    rows = [line for line in lines if line.startswith("layer")]
    assert len(rows) == 2 and all(line.count(".90") == 2 for line in rows)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_files(text: str, tmp_path: Path) -> None:
    trace = traced([text, "plain"])
    trace.save(tmp_path / "x.json")
    assert shardlens.Trace.load(tmp_path / "x.json").names == trace.names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace.save(tmp_path / "x.png")
    from matplotlib.image import imread

    assert imread(tmp_path / "x.png").std() > 0
    if not any(unicodedata.category(c) == "Cs" for c in text):
        from pyarrow import parquet

        trace.save(tmp_path / "x.parquet")
        tokens = parquet.read_table(tmp_path / "x.parquet").to_pydict()["token"]
        assert tokens == [trace.names[id] for id in trace.token_ids.flatten().tolist()]


class Page(HTMLParser):
    """The tags, attributes and texts of a page, comments included."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a page has no comment")


def test_a_page_runs_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.html"
    traced(TEXTS).save(path)
    page = Page(path.read_text(encoding="utf-8"))
    plain = Page("")
    traced(["plain"] * 30).save(path)
    plain = Page(path.read_text(encoding="utf-8"))
    assert page.tags == plain.tags and set(page.tags).isdisjoint({"script", "img", "base", "link"})
    names = {name for name, _ in page.attributes}
    assert names == {name for name, _ in plain.attributes}
    assert names <= {"charset", "http-equiv", "content", "style", "title", "class"}
    assert page.tags[:2] == ["meta", "meta"], "the policy comes before all else"
    policy = page.attributes[2][1]
    assert page.attributes[1] == ("http-equiv", "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "script" not in policy and "*" not in policy
    for text in page.texts:
        assert not hidden_in(text, but="\n")
    for _, value in page.attributes:
        assert not hidden_in(value, but="\n")
    shown = "".join(page.texts)
    for part in (
        "<script>alert(1)</script>",
        "<1B>]0;owned<07>",
        ":bomb:",
        "<D7><FF>",
        "<202E>txt",
    ):
        assert part in shown


def prompt_of_all() -> str:
    """The texts that an argument can hold and a vocabulary can spell, in one prompt."""
    spelt = [
        text for text in TEXTS if "\x00" not in text and not re.search("[\ud800-\udfff]", text)
    ]
    assert len(spelt) == 27
    return "|".join(text[:45] for text in spelt)


def echoed(prompt: str) -> str:
    """The prompt as it is to be shown."""
    return "".join(
        f"<{ord(c):0{2 if ord(c) < 128 else 4}X}>" if hidden_in(c, but="\n\t") else c
        for c in prompt
    )


WORDS = ["generate", "demo", "--max-new-tokens", "2", "--prompt"]


def test_an_echoed_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where output is piped, it is what was given, but for hidden characters; in JSON exactly."""
    path, prompt = tmp_path / "x.json", prompt_of_all()
    assert main([*WORDS, prompt, "--json", str(path)]) == 0
    shown, content = capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))
    assert content["prompt"] == prompt
    assert shown == echoed(prompt) + echoed(content["text"]) + "\n"


def test_a_command_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with pseudo_terminal() as (terminal, found):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main([*WORDS, prompt_of_all()]) == 0
        monkeypatch.undo()
    shown = b"".join(found).decode("utf-8")
    assert "\x1b[2m" in shown, "the prompt is dim"
    plain = COLOURS.sub("", shown)
    assert plain.startswith(echoed(prompt_of_all())) and not hidden_in(plain, but="\n\t")


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_errors_are_a_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["lens", f"/no/{text}".replace("\x00", "")], ["lens", "demo", f"--{text}"]):
        assert main([*words, "--prompt", "a"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("shardlens: ") and said[:-1].isprintable() and said[-1] == "\n"


def test_a_prompt_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, shown in (("ab\udcd7", "<D7>"), ("ab\ud800", "<D800>")):
        assert main([*WORDS, prompt]) == 2
        line = f"shardlens: character 3 of the text, {shown}, is not valid UTF-8\n"
        assert capsys.readouterr().err == line


def test_texts_side_by_side(
    vector: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the columns of `steer generate`, line breaks are shown, and made."""
    texts = itertools.cycle(TEXTS)
    generate = shardlens.LanguageModel.generate

    def hostile(self: shardlens.LanguageModel, *asked: object, **options: object) -> object:
        results = generate(self, *asked, **options)  # type: ignore[arg-type, call-overload]
        for result in results:
            result.text = next(texts)
        return results

    monkeypatch.setattr(shardlens.LanguageModel, "generate", hostile)
    scales = [f"{scale}" for scale in range(1, 5)]
    words = ["steer", "generate", "demo", "--vector", str(vector), "--prompt", "a", "--scale"]
    shown = ""
    for _ in range(6):
        assert main([*words, *scales, "--max-new-tokens", "1"]) == 0
        shown += capsys.readouterr().out
    assert not hidden_in(shown, but="\n")
    assert "a⇥b⏎" in shown and ":bomb:" in shown and "[red]no" in shown and "<1B>]0;owned" in shown

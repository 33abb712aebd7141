"""Traces of hostile tokens: shown as text on a terminal, in pages and pictures, kept in JSON."""

from __future__ import annotations

import unicodedata
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hostile import COLOURS, TEXTS, hidden_in, pseudo_terminal, traced
from rich.cells import cell_len
from rich.console import Console

from shardlens.interp import Trace, print_trace


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
    assert Trace.load(tmp_path / "x.json").names == trace.names
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

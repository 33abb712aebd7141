"""Pages with hostile tokens in a real browser: nothing runs, and the text is what it was."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hostile import TEXTS, traced

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# texts that would change the page's title or its content if they were more than text
RUNNING = [
    "<script>document.title='OWNED'</script>",
    "<img src=x onerror=\"document.title='OWNED'\">",
    '"><svg onload="document.title=\'OWNED\'">',
    "' onmouseover='document.title=1' autofocus onfocus='document.title=\"OWNED\"",
    "</style><script>document.body.innerHTML='OWNED'</script>",
    "</title><script>document.title='OWNED'</script>",
    "<iframe srcdoc=\"<script>parent.document.title='OWNED'</script>\"></iframe>",
    '<meta http-equiv=refresh content="0;url=data:text/html,<title>OWNED</title>">',
    "&#60;script&#62;document.title='OWNED'&#60;/script&#62;",
]


def shown_by_browser(path: Path, folder: Path) -> str:
    """The page as it stands after its scripts, if any, have run."""
    command = [CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder}",
        "--virtual-time-budget=2000",
    ]
    ran = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_nothing_runs(tmp_path: Path) -> None:
    bait = "<html><head><title>plain</title></head><body>" + RUNNING[0] + "</body></html>"
    (tmp_path / "bait.html").write_text(bait)
    found = shown_by_browser(tmp_path / "bait.html", tmp_path / "profile")
    assert "<title>OWNED</title>" in found, "the browser runs scripts, and a script would show"
    path = tmp_path / "x.html"
    traced([*TEXTS, *RUNNING]).save(path)
    source = path.read_text(encoding="utf-8")
    found = shown_by_browser(path, tmp_path / "profile")
    before, after = Content(source), Content(found)
    assert before.tags == after.tags and set(after.tags).isdisjoint(ACTIVE)
    assert before.titles == after.titles and before.texts == after.texts
    assert not any(name.startswith("on") for name in after.attributes)
    shown = "".join(after.texts)
    for text in ("<script>alert(1)</script>", *RUNNING):
        assert text in shown


ACTIVE = {"script", "img", "svg", "iframe", "base", "link", "object", "embed", "form"}


class Content(HTMLParser):
    """The content of a page, but for the tags that a browser adds."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("html", "head", "body", "tbody"):
            self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.texts += [data.strip()] if data.strip() else []

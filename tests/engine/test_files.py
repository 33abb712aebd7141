"""Output files: what stands at their path is respected, and they are whole or absent."""

from __future__ import annotations

import json
import os
import resource
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardlens.engine import (
    WriteError,
    check_outputs,
    check_writable,
    replacing,
    write_json,
)

CONTENT = {"numbers": [1, 2, 3], "text": "é"}
BIG = {"numbers": list(range(10_000))}


def read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json(tmp_path / "x.json", CONTENT)
    assert read(tmp_path / "x.json") == CONTENT
    assert mode(tmp_path / "x.json") == mode(tmp_path / "plain")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o666, 0o755])
def test_a_file_keeps_its_mode(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.touch()
    path.chmod(bits)
    write_json(path, CONTENT)
    assert read(path) == CONTENT and mode(path) == bits


def test_a_read_only_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    path.chmod(0o444)
    for act in (check_writable, lambda at: write_json(at, CONTENT)):
        with pytest.raises(ValueError, match=r"x\.json cannot be written: it is read-only"):
            act(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    link, target = tmp_path / "latest.json", tmp_path / "runs" / "3.json"
    link.symlink_to("middle")
    (tmp_path / "middle").symlink_to("runs/3.json")
    for content in (CONTENT, BIG):  # dangling at first
        write_json(link, content)
        assert link.is_symlink() and not target.is_symlink() and read(target) == content
    assert list(target.parent.iterdir()) == [target]


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ValueError, match=r"a cannot be written: Too many levels"):
        check_writable(tmp_path / "a")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, CONTENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"x\.json cannot be written: File too large"):
            write_json(path, BIG)
        with pytest.raises(WriteError, match=r"y\.json cannot be written: File too large"):
            write_json(tmp_path / "y.json", BIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(path) == CONTENT and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_ends_early_leaves_nothing(error: type, tmp_path: Path) -> None:
    with pytest.raises(error), replacing(tmp_path / "x") as file:
        file.write(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    for name in ("x" * 250, "é" * 127, "y" * 255):
        write_json(tmp_path / name, CONTENT)
        write_json(tmp_path / name, BIG)
        assert read(tmp_path / name) == BIG
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="cannot be written: File name too long"):
        check_writable(tmp_path / ("x" * 256))


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if somebody could guess the name of the partial file."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    planted = tmp_path / ".shardlens-guessed.partial"
    planted.symlink_to(victim)
    with pytest.raises(ValueError, match=r"x\.json cannot be written: File exists"):
        write_json(tmp_path / "x.json", CONTENT)
    assert victim.read_text() == "precious" and planted.is_symlink()
    planted.unlink()
    write_json(tmp_path / "x.json", CONTENT)
    monkeypatch.undo()
    names: set[str] = set()
    for _ in range(2):
        with replacing(tmp_path / "x.json") as file:
            names.add(str(file.name))
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600, "until it is whole"
            names |= {path.name for path in tmp_path.iterdir()} - {"x.json", "victim"}
    assert len([name for name in names if name.startswith(".shardlens-")]) == 2


def test_folders_and_files_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "x.json", f"there is no folder {tmp_path / 'none'}"),
        (tmp_path / "file" / "x.json", "Not a directory"),
        (Path("/proc/x.json"), ""),
    ):
        with pytest.raises(ValueError, match=f"{path} cannot be written: {reason}"):
            check_writable(path)


def test_a_file_is_asked_for_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a.json")
    a, b, null = tmp_path / "a.json", tmp_path / "b.json", Path("/dev/null")
    check_outputs([a, b, null, null])
    for again in (a, tmp_path / "link"):
        with pytest.raises(ValueError, match="is to be written twice"):
            check_outputs([a, b, again])


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """A folder that other users can reach, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_nobody(act: Callable[[], None]) -> str:
    """The ValueError that a call raises in a process without any right, or "nothing"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            act()
        except ValueError as error:
            said = str(error)
        except BaseException as error:
            said = repr(error)
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user() -> None:
    with folder_for_all() as folder:
        locked, file, shared = folder / "locked", folder / "x.json", folder / "shared"
        for path in (locked, shared):
            path.mkdir()
        shared.chmod(0o777)
        file.write_text("old")
        (shared / "x.json").write_text("old")
        for path, reason in (
            (file, "it is read-only"),
            (shared / "x.json", "it is read-only"),
            (locked / "y.json", f"its folder {locked} is read-only"),
        ):
            for act in (check_writable, lambda at: write_json(at, CONTENT)):
                said = as_nobody(lambda act=act, path=path: act(path))  # type: ignore[misc]
                assert said == f"{path} cannot be written: {reason}"
        assert as_nobody(lambda: write_json(shared / "y.json", CONTENT)) == "nothing"
        # root replaces a file of another user's, which stays theirs
        write_json(shared / "y.json", BIG)
        assert read(shared / "y.json") == BIG and (shared / "y.json").stat().st_uid == 65534
        assert sorted(path.name for path in shared.iterdir()) == ["x.json", "y.json"]


def test_halves_of_characters_in_json(tmp_path: Path) -> None:
    content = {"text": "a\udcd7\ud800\n\x1b \u202e 日本 👩‍💻", "\ud800": 1}
    write_json(tmp_path / "x.json", content)
    assert read(tmp_path / "x.json") == content

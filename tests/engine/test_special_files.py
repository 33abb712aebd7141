"""Devices, fifos and standard output as output files: written to as they are."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shardlens.engine import WriteError, check_writable, write_json

CONTENT = {"text": "é"}
BIG = {"numbers": list(range(10_000))}


def read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_device_stays(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.read_bytes()
    except PermissionError:
        pytest.skip("needs to make and open a device node")
    (tmp_path / "link").symlink_to("null")
    for path in (device, tmp_path / "link"):
        check_writable(path)
        write_json(path, CONTENT)
    assert stat.S_ISCHR(device.stat().st_mode) and len(list(tmp_path.iterdir())) == 2


def test_a_fifo_stays(tmp_path: Path) -> None:
    fifo, found = tmp_path / "fifo.json", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: found.append(read(fifo)))
    reader.start()
    write_json(fifo, BIG)
    reader.join(20)
    assert found == [BIG] and stat.S_ISFIFO(fifo.stat().st_mode)
    assert list(tmp_path.iterdir()) == [fifo]


def test_a_full_device_is_no_bad_input() -> None:
    check_writable(Path("/dev/full"))
    with pytest.raises(WriteError, match=r"^/dev/full cannot be written: No space left on device$"):
        write_json(Path("/dev/full"), BIG)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


WRITES = """
import sys; from pathlib import Path; from shardlens.engine import write_json
print("before"); write_json(Path(sys.argv[1]), {"a": 1}); print("after")
"""


@pytest.mark.parametrize("to_file", [False, True], ids=["pipe", "file"])
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "out"])
def test_standard_output(path: str, to_file: bool, tmp_path: Path) -> None:
    """A file behind it is continued, under whatever name it is given, and not begun anew."""
    if path == "out" and not to_file:
        pytest.skip("a pipe has no name")
    with (tmp_path / "out").open("wb") as out:
        command = [sys.executable, "-c", WRITES, path]
        output = out if to_file else subprocess.PIPE
        ran = subprocess.run(command, stdout=output, cwd=tmp_path, timeout=60, check=True)
    shown = (tmp_path / "out").read_bytes() if to_file else ran.stdout
    assert shown == b'before\n{\n "a": 1\n}\nafter\n'
    assert [each.name for each in tmp_path.iterdir()] == ["out"]

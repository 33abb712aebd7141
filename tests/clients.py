"""Projects that embed this one: installed beside the tests, and seen by their processes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

CLIENTS = Path(__file__).resolve().parents[1] / ".clients"


def environment(package: str) -> dict[str, str]:
    """The variables with which a process sees a client's package; the test skips without it."""
    if not (CLIENTS / package).is_dir():
        pytest.skip(f"needs {package} in .clients, where .ci/clients installs it")
    return {"PYTHONPATH": str(CLIENTS), "PYTHONWARNINGS": "ignore"}

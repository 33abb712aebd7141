"""Commands as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[1] / "launch.sh"


def launch(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """./launch.sh with the python that runs the tests first on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [str(LAUNCH), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": path},
        **options,  # type: ignore[call-overload]
    )

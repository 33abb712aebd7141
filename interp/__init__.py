"""The logit lens, its traces, and how they are shown and written."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["LensRecorder", "LensSpec", "Trace"]

if TYPE_CHECKING:
    from .lens import LensRecorder, LensSpec
    from .trace import Trace
else:
    # Imported when first used: output files do without torch.
    _HOMES = {"LensRecorder": ".lens", "LensSpec": ".lens", "Trace": ".trace"}

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name], __name__), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

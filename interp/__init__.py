"""The logit lens, its traces, and how they are shown and written."""

from typing import TYPE_CHECKING

from ..parallel.lazy import lazily

__all__ = ["LensRecorder", "LensSpec", "Trace"]

if TYPE_CHECKING:
    from .lens import LensRecorder, LensSpec
    from .trace import Trace
else:
    # Imported when first used: output files do without torch.
    _HOMES = {"LensRecorder": ".lens", "LensSpec": ".lens", "Trace": ".trace"}
    __getattr__, __dir__ = lazily(__name__, _HOMES)

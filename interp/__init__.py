"""Traces, steering vectors from pairs of answers, and what they do to a model."""

import sys
from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

__all__ = ["LensRecorder", "Trace"]

if TYPE_CHECKING:
    from .lens import LensRecorder
    from .trace import Trace
else:
    _HOMES = {
        "LensRecorder": ".lens",
        "Trace": ".trace",
    }
    sys.modules[__name__].__class__ = lazy_package(_HOMES)

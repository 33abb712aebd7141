"""The logit lens, its traces, and how they are shown and written."""

from .lens import LensRecorder, LensSpec
from .trace import Trace

__all__ = ["LensRecorder", "LensSpec", "Trace"]

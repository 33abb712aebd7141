"""The operations that decide speed and memory, one to a file; nothing here knows of ranks."""

from .gumbel import gumbel_reference, philox_reference
from .head_stats_reference import HeadStats, Noise, Target, head_stats_reference
from .rmsnorm import rmsnorm_reference
from .rope import rope_angles_reference, rope_reference
from .swiglu import swiglu_reference

__all__ = [
    "HeadStats",
    "Noise",
    "Target",
    "gumbel_reference",
    "head_stats_reference",
    "philox_reference",
    "rmsnorm_reference",
    "rope_angles_reference",
    "rope_reference",
    "swiglu_reference",
]

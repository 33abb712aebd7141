"""The operations that decide speed and memory, one to a file; nothing here knows of ranks.

Each has a PyTorch reference beside its Triton kernel; `implementation` switches between them.
"""

import sys
from typing import TYPE_CHECKING

from .lazy_imports import lazy_package

__all__ = [
    "MODES",
    "Edits",
    "HeadOptions",
    "HeadStats",
    "Noise",
    "RowStats",
    "SampleStats",
    "Target",
    "decode_attention",
    "decode_attention_reference",
    "edit_reference",
    "gumbel_reference",
    "head_stats",
    "head_stats_reference",
    "implementation",
    "linear",
    "mass_above_reference",
    "philox_reference",
    "rmsnorm_reference",
    "rmsnorm_steer",
    "rmsnorm_steer_reference",
    "rope_angles_reference",
    "rope_qk",
    "rope_qk_reference",
    "rope_reference",
    "set_implementation",
    "swiglu",
    "swiglu_reference",
    "target_logits",
    "target_logits_reference",
]

if TYPE_CHECKING:
    from .decode_attention import decode_attention, decode_attention_reference
    from .dispatch import implementation, set_implementation
    from .edits import MODES, Edits, edit_reference
    from .few_rows_linear import linear
    from .gumbel import gumbel_reference, philox_reference
    from .head_stats import head_stats
    from .head_stats_reference import head_stats_reference, mass_above_reference
    from .head_types import HeadOptions, HeadStats, Noise, RowStats, SampleStats, Target
    from .rmsnorm_steer import rmsnorm_reference, rmsnorm_steer, rmsnorm_steer_reference
    from .rope import rope_angles_reference, rope_reference
    from .rope_qk import rope_qk, rope_qk_reference
    from .swiglu import swiglu, swiglu_reference
    from .target_logits import target_logits, target_logits_reference
else:
    _HOMES = {
        "Edits": ".edits",
        "HeadOptions": ".head_types",
        "HeadStats": ".head_types",
        "MODES": ".edits",
        "Noise": ".head_types",
        "RowStats": ".head_types",
        "SampleStats": ".head_types",
        "Target": ".head_types",
        "decode_attention": ".decode_attention",
        "decode_attention_reference": ".decode_attention",
        "edit_reference": ".edits",
        "gumbel_reference": ".gumbel",
        "head_stats": ".head_stats",
        "head_stats_reference": ".head_stats_reference",
        "implementation": ".dispatch",
        "linear": ".few_rows_linear",
        "mass_above_reference": ".head_stats_reference",
        "philox_reference": ".gumbel",
        "rmsnorm_reference": ".rmsnorm_steer",
        "rmsnorm_steer": ".rmsnorm_steer",
        "rmsnorm_steer_reference": ".rmsnorm_steer",
        "rope_angles_reference": ".rope",
        "rope_qk": ".rope_qk",
        "rope_qk_reference": ".rope_qk",
        "rope_reference": ".rope",
        "set_implementation": ".dispatch",
        "swiglu": ".swiglu",
        "swiglu_reference": ".swiglu",
        "target_logits": ".target_logits",
        "target_logits_reference": ".target_logits",
    }
    sys.modules[__name__].__class__ = lazy_package(_HOMES)

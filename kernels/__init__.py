"""The operations that decide speed and memory, one to a file; nothing here knows of ranks.

Each has a PyTorch reference beside its Triton kernel; `implementation` switches between them.
"""

from .decode_attention import decode_attention, decode_attention_reference
from .edits import MODES, Edits, edit_reference
from .gumbel import gumbel_reference, philox_reference
from .head_stats import head_stats
from .head_stats_reference import HeadStats, Noise, Target, head_stats_reference
from .linear import linear
from .rmsnorm_steer import rmsnorm_reference, rmsnorm_steer, rmsnorm_steer_reference
from .rope import rope_angles_reference, rope_reference
from .rope_qk import rope_qk, rope_qk_reference
from .swiglu import swiglu, swiglu_reference
from .switch import implementation, set_implementation
from .target_logits import target_logits, target_logits_reference

__all__ = [
    "MODES",
    "Edits",
    "HeadStats",
    "Noise",
    "Target",
    "decode_attention",
    "decode_attention_reference",
    "edit_reference",
    "gumbel_reference",
    "head_stats",
    "head_stats_reference",
    "implementation",
    "linear",
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

"""The operations that decide speed and memory, one to a file; nothing here knows of ranks.

Each has a PyTorch reference beside its Triton kernel; `implementation` switches between them.
"""

from typing import TYPE_CHECKING

from .lazy_imports import lazy_package

if TYPE_CHECKING:
    from .decode_attention import decode_attention as decode_attention
    from .decode_attention import decode_attention_reference as decode_attention_reference
    from .dispatch import implementation as implementation
    from .dispatch import set_implementation as set_implementation
    from .edits import MODES as MODES
    from .edits import Edits as Edits
    from .edits import edit_reference as edit_reference
    from .few_rows_linear import linear as linear
    from .gumbel import gumbel_reference as gumbel_reference
    from .gumbel import philox_reference as philox_reference
    from .head_stats import head_stats as head_stats
    from .head_stats_reference import head_stats_reference as head_stats_reference
    from .head_stats_reference import mass_above_reference as mass_above_reference
    from .head_types import HeadOptions as HeadOptions
    from .head_types import HeadStats as HeadStats
    from .head_types import Noise as Noise
    from .head_types import RowStats as RowStats
    from .head_types import SampleStats as SampleStats
    from .head_types import Target as Target
    from .launch import Chip as Chip
    from .launch import pretending as pretending
    from .rmsnorm_steer import rmsnorm_reference as rmsnorm_reference
    from .rmsnorm_steer import rmsnorm_steer as rmsnorm_steer
    from .rmsnorm_steer import rmsnorm_steer_reference as rmsnorm_steer_reference
    from .rope import rope_angles_reference as rope_angles_reference
    from .rope import rope_reference as rope_reference
    from .rope_qk import rope_qk as rope_qk
    from .rope_qk import rope_qk_reference as rope_qk_reference
    from .rounding import tensor_core_slack as tensor_core_slack
    from .swiglu import swiglu as swiglu
    from .swiglu import swiglu_reference as swiglu_reference
    from .target_logits import target_logits as target_logits
    from .target_logits import target_logits_reference as target_logits_reference

lazy_package(__name__)

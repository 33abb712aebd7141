"""Config, weights, transformer, cache, and the points at which it is read and edited."""

from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

if TYPE_CHECKING:
    from .attention import causal_attention as causal_attention
    from .cache import KVCache as KVCache
    from .config import ModelConfig as ModelConfig
    from .gguf_files import GgufFile as GgufFile
    from .load import load_model as load_model
    from .model_files import ModelFiles as ModelFiles
    from .model_files import read_config as read_config
    from .packaged import packaged_path as packaged_path
    from .points import POINTS as POINTS
    from .points import Tap as Tap
    from .points import parse_layers as parse_layers
    from .rope import inverse_frequencies as inverse_frequencies
    from .rope_config import RopeScaling as RopeScaling
    from .sharded_state import sharded_state_dict as sharded_state_dict
    from .source import DEMO as DEMO
    from .source import find_model as find_model
    from .tap_edits import EditFn as EditFn
    from .tap_edits import TapEdits as TapEdits
    from .tap_sink import RowTaps as RowTaps
    from .tap_sink import TapBuffer as TapBuffer
    from .tap_sink import TapSink as TapSink
    from .transformer import ForwardPass as ForwardPass
    from .transformer import Transformer as Transformer
    from .weights import hf_state_dict as hf_state_dict
    from .weights import init_weights as init_weights
    from .weights import load_weights as load_weights

lazy_package(__name__)

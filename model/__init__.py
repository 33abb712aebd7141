"""Config, weights, transformer, cache, and the points at which it is read and edited."""

import sys
from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

__all__ = ["ModelConfig", "Transformer", "hf_state_dict", "init_weights", "load_weights"]

if TYPE_CHECKING:
    from .config import ModelConfig
    from .transformer import Transformer
    from .weights import hf_state_dict, init_weights, load_weights
else:
    _HOMES = {
        "ModelConfig": ".config",
        "Transformer": ".transformer",
        "hf_state_dict": ".weights",
        "init_weights": ".weights",
        "load_weights": ".weights",
    }
    sys.modules[__name__].__class__ = lazy_package(_HOMES)

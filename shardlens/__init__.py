"""Read and steer LLaMA and Qwen models too large for one GPU, while they run."""

import sys
from typing import TYPE_CHECKING

from .kernels.lazy_imports import lazy_package

__all__ = [
    "LanguageModel",
    "LensSpec",
    "ModelConfig",
    "Pair",
    "PromptForm",
    "Request",
    "Result",
    "Sampling",
    "SteerabilityReport",
    "Steering",
    "SteeringVectors",
    "Tap",
    "TensorParallel",
    "Tokenizer",
    "Trace",
    "Transformer",
    "load",
    "read_pairs",
]

if TYPE_CHECKING:
    from .engine.lens_spec import LensSpec
    from .engine.request import Request
    from .engine.sampling import Sampling
    from .engine.steering import Steering
    from .engine.vectors import SteeringVectors
    from .interp.labels import PromptForm
    from .interp.pairs import Pair, read_pairs
    from .interp.report import SteerabilityReport
    from .interp.trace import Trace
    from .language_model import LanguageModel, Result, load
    from .model.config import ModelConfig
    from .model.points import Tap
    from .model.transformer import Transformer
    from .parallel.group import TensorParallel
    from .tokenizer.tokenizer import Tokenizer
else:
    # Imported when first used: torch takes seconds, and not every command needs it.
    _HOMES = {
        "LanguageModel": ".language_model",
        "LensSpec": ".engine.lens_spec",
        "ModelConfig": ".model.config",
        "Pair": ".interp.pairs",
        "PromptForm": ".interp.labels",
        "Request": ".engine.request",
        "Result": ".language_model",
        "Sampling": ".engine.sampling",
        "SteerabilityReport": ".interp.report",
        "Steering": ".engine.steering",
        "SteeringVectors": ".engine.vectors",
        "Tap": ".model.points",
        "TensorParallel": ".parallel.group",
        "Tokenizer": ".tokenizer.tokenizer",
        "Trace": ".interp.trace",
        "Transformer": ".model.transformer",
        "load": ".language_model",
        "read_pairs": ".interp.pairs",
    }
    _FOLDERS = ("engine", "interp", "kernels", "model", "parallel", "tokenizer")
    sys.modules[__name__].__class__ = lazy_package(_HOMES, _FOLDERS)

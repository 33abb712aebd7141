"""Read and steer LLaMA and Qwen models too large for one GPU, while they run."""

import sys
from typing import TYPE_CHECKING

from .kernels.lazy_imports import lazy_package

__all__ = [
    "LensSpec",
    "ModelConfig",
    "Pair",
    "PromptForm",
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
    "extract",
    "generate",
    "lens",
    "load",
    "read_pairs",
    "steerability",
]

if TYPE_CHECKING:
    from .engine.lens_spec import LensSpec
    from .engine.sampling import Sampling
    from .engine.steering import Steering
    from .engine.vectors import SteeringVectors
    from .interp.extract import extract
    from .interp.pairs import Pair, read_pairs
    from .interp.prompts import PromptForm
    from .interp.report import SteerabilityReport
    from .interp.steerability import steerability
    from .interp.trace import Trace
    from .model.config import ModelConfig
    from .model.load import load
    from .model.points import Tap
    from .model.transformer import Transformer
    from .parallel.group import TensorParallel
    from .run import Result, generate, lens
    from .tokenizer.tokenizer import Tokenizer
else:
    # Imported when first used: torch takes seconds, and not every command needs it.
    _HOMES = {
        "LensSpec": ".engine.lens_spec",
        "ModelConfig": ".model.config",
        "Pair": ".interp.pairs",
        "PromptForm": ".interp.prompts",
        "Result": ".run",
        "Sampling": ".engine.sampling",
        "SteerabilityReport": ".interp.report",
        "Steering": ".engine.steering",
        "SteeringVectors": ".engine.vectors",
        "Tap": ".model.points",
        "TensorParallel": ".parallel.group",
        "Tokenizer": ".tokenizer.tokenizer",
        "Trace": ".interp.trace",
        "Transformer": ".model.transformer",
        "extract": ".interp.extract",
        "generate": ".run",
        "lens": ".run",
        "load": ".model.load",
        "read_pairs": ".interp.pairs",
        "steerability": ".interp.steerability",
    }
    _FOLDERS = ("engine", "interp", "kernels", "model", "parallel", "tokenizer")
    sys.modules[__name__].__class__ = lazy_package(_HOMES, _FOLDERS)

"""Read and steer LLaMA and Qwen models too large for one GPU, while they run."""

from typing import TYPE_CHECKING

from .parallel.lazy import lazily

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
    from .interp.extract import extract
    from .interp.lens import LensSpec
    from .interp.pairs import Pair, read_pairs
    from .interp.prompts import PromptForm
    from .interp.report import SteerabilityReport
    from .interp.steerability import steerability
    from .interp.trace import Trace
    from .interp.vectors import SteeringVectors
    from .model.config import ModelConfig
    from .model.load import load
    from .model.points import Tap
    from .model.sampling import Sampling
    from .model.steering import Steering
    from .model.tokenizer import Tokenizer
    from .model.transformer import Transformer
    from .parallel.group import TensorParallel
    from .run import Result, generate, lens
else:
    # Imported when first used: torch takes seconds, and not every command needs it.
    _HOMES = {
        "LensSpec": ".interp.lens",
        "ModelConfig": ".model.config",
        "Pair": ".interp.pairs",
        "PromptForm": ".interp.prompts",
        "Result": ".run",
        "Sampling": ".model.sampling",
        "SteerabilityReport": ".interp.report",
        "Steering": ".model.steering",
        "SteeringVectors": ".interp.vectors",
        "Tap": ".model.points",
        "TensorParallel": ".parallel.group",
        "Tokenizer": ".model.tokenizer",
        "Trace": ".interp.trace",
        "Transformer": ".model.transformer",
        "extract": ".interp.extract",
        "generate": ".run",
        "lens": ".run",
        "load": ".model.load",
        "read_pairs": ".interp.pairs",
        "steerability": ".interp.steerability",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES, ("interp", "kernels", "model", "parallel"))

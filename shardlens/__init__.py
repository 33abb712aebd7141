"""Read and steer LLaMA and Qwen models too large for one GPU, while they run."""

from .interp.lens import LensSpec
from .interp.trace import Trace
from .model.capture import Tap
from .model.config import ModelConfig
from .model.load import load
from .model.sampling import Sampling
from .model.tokenizer import Tokenizer
from .model.transformer import Transformer
from .parallel.group import TensorParallel
from .run import Result, generate, lens

__all__ = [
    "LensSpec",
    "ModelConfig",
    "Result",
    "Sampling",
    "Tap",
    "TensorParallel",
    "Tokenizer",
    "Trace",
    "Transformer",
    "generate",
    "lens",
    "load",
]

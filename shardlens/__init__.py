"""Read and steer LLaMA and Qwen models too large for one GPU, while they run."""

from typing import TYPE_CHECKING

from .parallel.lazy import lazily

__all__ = [
    "LensSpec",
    "ModelConfig",
    "Result",
    "Sampling",
    "Steering",
    "Tap",
    "TensorParallel",
    "Tokenizer",
    "Trace",
    "Transformer",
    "generate",
    "lens",
    "load",
]

if TYPE_CHECKING:
    from .interp.lens import LensSpec
    from .interp.trace import Trace
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
        "Result": ".run",
        "Sampling": ".model.sampling",
        "Steering": ".model.steering",
        "Tap": ".model.points",
        "TensorParallel": ".parallel.group",
        "Tokenizer": ".model.tokenizer",
        "Trace": ".interp.trace",
        "Transformer": ".model.transformer",
        "generate": ".run",
        "lens": ".run",
        "load": ".model.load",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES, ("interp", "kernels", "model", "parallel"))

"""Read and steer LLaMA and Qwen models too large for one GPU, while they run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    _FOLDERS = ("interp", "kernels", "model", "parallel")

    def __getattr__(name: str) -> Any:
        if name in _FOLDERS:
            return import_module(f".{name}", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name], __name__), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_FOLDERS})

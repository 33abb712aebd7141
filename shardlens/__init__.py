"""Read and steer LLaMA and Qwen models too large for one GPU, while they run."""

from typing import TYPE_CHECKING

from .kernels.lazy_imports import lazy_package

if TYPE_CHECKING:
    from .engine.lens_spec import LensSpec as LensSpec
    from .engine.request import Request as Request
    from .engine.sampling import Sampling as Sampling
    from .engine.steering import Steering as Steering
    from .engine.vectors import SteeringVectors as SteeringVectors
    from .interp.labels import PromptForm as PromptForm
    from .interp.pairs import Pair as Pair
    from .interp.pairs import read_pairs as read_pairs
    from .interp.report import SteerabilityReport as SteerabilityReport
    from .interp.trace import Trace as Trace
    from .language_model import LanguageModel as LanguageModel
    from .language_model import Result as Result
    from .language_model import load as load
    from .model.config import ModelConfig as ModelConfig
    from .model.points import Tap as Tap
    from .model.transformer import Transformer as Transformer
    from .parallel.group import TensorParallel as TensorParallel
    from .tokenizer.tokenizer import Tokenizer as Tokenizer

# Imported when first used: torch takes seconds, and not every command needs it.
lazy_package(__name__, ("engine", "interp", "kernels", "model", "parallel", "tokenizer"))

"""Config, transformer, cache, weights, tokenizer, generation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["ModelConfig", "Transformer", "hf_state_dict", "init_weights", "load_weights"]

if TYPE_CHECKING:
    from .config import ModelConfig
    from .transformer import Transformer
    from .weights import hf_state_dict, init_weights, load_weights
else:
    # Imported when first used: config and plan do without torch.
    _HOMES = {
        "ModelConfig": ".config",
        "Transformer": ".transformer",
        "hf_state_dict": ".weights",
        "init_weights": ".weights",
        "load_weights": ".weights",
    }

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name], __name__), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

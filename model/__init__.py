"""Config, transformer, cache, weights, tokenizer, generation."""

from typing import TYPE_CHECKING

from ..parallel.lazy import lazily

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
    __getattr__, __dir__ = lazily(__name__, _HOMES)

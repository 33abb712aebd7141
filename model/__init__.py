"""Config, transformer, cache, weights, tokenizer, generation."""

from .config import ModelConfig
from .transformer import Transformer
from .weights import hf_state_dict, init_weights, load_weights

__all__ = ["ModelConfig", "Transformer", "hf_state_dict", "init_weights", "load_weights"]

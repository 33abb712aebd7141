"""Text to token ids and back, where tokens stand in a text, and chat templates."""

import sys
from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

__all__ = ["Tokenizer"]

if TYPE_CHECKING:
    from .tokenizer import Tokenizer
else:
    _HOMES = {
        "Tokenizer": ".tokenizer",
    }
    sys.modules[__name__].__class__ = lazy_package(_HOMES)

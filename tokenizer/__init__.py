"""Text to token ids and back, where tokens stand in a text, and chat templates."""

from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

if TYPE_CHECKING:
    from .encoding import Encoded as Encoded
    from .encoding import Span as Span
    from .gguf_vocabulary import gguf_tokenizer as gguf_tokenizer
    from .tokenizer import Tokenizer as Tokenizer

lazy_package(__name__)

"""Triton where it is installed; elsewhere names that let the kernel files be imported."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # it is not published for every platform; the references remain

    class _Missing:
        """Decorators and markers that return what they get."""

        def __getattr__(self, name: str) -> Any:
            return lambda given=None, **options: given

    triton = tl = _Missing()
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "tl", "triton"]

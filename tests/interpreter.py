"""Makes Triton's interpreter right for bf16 and safe for ranks that are threads.

The interpreter multiplies the raw bits of bf16 operands in `tl.dot` and truncates float32 where it
casts to bf16. This patches two functions of its private API; test_interpreter.py guards it.
Import it after TRITON_INTERPRET=1 is set and before any kernel runs.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from triton.runtime import interpreter

_launching = threading.RLock()
_dot, _convert_float = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
_run = interpreter.GridExecutor.__call__


def _widened(handle: Any) -> Any:
    if not handle.dtype.scalar.is_bf16():
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)


def _dot_of_bf16(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), *rest)


def _rounding_convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
    if not (source.is_fp32() and target.is_bf16()):
        return _convert_float(values, source, target, mode)
    bits = np.ascontiguousarray(values).view(np.uint32)
    to_even = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    rounded = ((bits + to_even) >> 16).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _one_at_a_time(self: Any, *arguments: Any, **options: Any) -> Any:
    with _launching:
        return _run(self, *arguments, **options)


def patch() -> None:
    interpreter.InterpreterBuilder.create_dot = _dot_of_bf16
    interpreter._convert_float = _rounding_convert
    interpreter.GridExecutor.__call__ = _one_at_a_time

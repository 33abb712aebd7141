"""Makes Triton's interpreter right for bf16, as exact as tensor cores, and safe for threads.

The interpreter multiplies the raw bits of bf16 operands in `tl.dot` and truncates float32 where it
casts to bf16. Its sums of products are better than those of tensor cores, and round differently in
tiles of other sizes, as those do not: so they are made as a tensor core makes them, which adds the
exact sum of a few columns' products at a time and truncates the accumulator. This patches three
functions of its private API; test_tensor_cores.py guards it.
Import it after TRITON_INTERPRET=1 is set and before any kernel runs.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from triton.runtime import interpreter

COLUMNS, COLUMNS_FLOAT32 = 16, 8  # whose products are added at a time
_launching = threading.RLock()
_dot, _convert_float = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
_run = interpreter.GridExecutor.__call__


def _widened(handle: Any) -> Any:
    if not handle.dtype.scalar.is_bf16():
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)


def toward_zero(values: Any) -> Any:
    """float64 as float32, truncated."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float32)
        is_larger = np.abs(rounded.astype(np.float64)) > np.abs(values)
        return np.where(is_larger, np.nextafter(rounded, np.float32(0)), rounded)


def _dot_of_tensor_cores(self: Any, a: Any, b: Any, acc: Any, precision: Any, *rest: Any) -> Any:
    columns = COLUMNS_FLOAT32 if a.dtype.scalar.is_fp32() else COLUMNS
    a, b = _widened(a), _widened(b)
    if precision == interpreter._ir.INPUT_PRECISION.IEEE:  # no tensor cores: fused multiply-adds
        return _dot(self, a, b, acc, precision, *rest)
    wide = a.data.astype(np.float64), b.data.astype(np.float64)  # [M, K], [K, N]
    (rows, depth), ids = wide[0].shape, wide[1].shape[1]
    steps = max(1, depth // columns)
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.matmul(
            wide[0].reshape(rows, steps, -1).swapaxes(0, 1), wide[1].reshape(steps, -1, ids)
        )
        total = acc.data
        for step in sums:
            total = toward_zero(total.astype(np.float64) + step)
    return interpreter.TensorHandle(total, acc.dtype.scalar)


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
    interpreter.InterpreterBuilder.create_dot = _dot_of_tensor_cores
    interpreter._convert_float = _rounding_convert
    interpreter.GridExecutor.__call__ = _one_at_a_time

"""What Triton's interpreter needs to compute as a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np


def exact_arithmetic() -> None:
    """After the call the interpreter multiplies and casts as a GPU does.

    A GPU's instructions treat all rows of a tile alike. numpy's BLAS does not: the last rows of 16
    go through another kernel. Summed in fp64 and rounded once, they agree. bf16, which numpy does
    not have, lies in 16-bit words that the interpreter multiplies as they are, and casts round
    towards zero. (It also adds and compares bf16 as words; our kernels do neither.)
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def wide(x: Any) -> Any:
        return _from_bf16(x.data) if x.dtype.scalar == tl.bfloat16 else x.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        product = np.matmul(wide(a).astype(np.float64), wide(b).astype(np.float64))
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        source, target = x.dtype.scalar, dtype.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, x, dtype)
        single = wide(x) if source == tl.bfloat16 else cast(self, x, tl.float32).data
        if target == tl.bfloat16:
            return TensorHandle(_to_bf16(single), target)
        return cast(self, TensorHandle(single, tl.float32), dtype)

    if not getattr(InterpreterBuilder, "exact_arithmetic", False):
        InterpreterBuilder.exact_arithmetic = True
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def _from_bf16(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounds to the nearest, ties to even."""
    words = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)

"""What Triton's interpreter needs for laws about bits."""

from __future__ import annotations

from typing import Any

import numpy as np


def exact_dots() -> None:
    """After the call a row of the interpreter's products does not depend on its place in the tile.

    A GPU's instructions treat all rows of a tile alike. numpy's BLAS does not: the last rows of 16
    go through another kernel. Summed in fp64 and rounded once, they agree.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot

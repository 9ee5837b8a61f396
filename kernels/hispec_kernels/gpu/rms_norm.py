"""Residual add and RMSNorm in one pass over a row; see :mod:`hispec_kernels.rms_norm`.

x += delta;   h = x / sqrt(mean(x²) + eps) · weight
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.turns import take_turn, turns


@triton.jit
def _add_rms_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    h_ptr,
    width_ptr,
    size,
    eps,
    TURNS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    take_turn(TURNS)
    row = tl.program_id(0)
    if row < tl.load(width_ptr):
        lane = tl.arange(0, BLOCK)
        mask = lane < size
        at = row * size + lane
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(delta_ptr + at, mask=mask, other=0.0)
            tl.store(x_ptr + at, x, mask=mask)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
        weight = tl.load(weight_ptr + lane, mask=mask, other=0.0).to(tl.float32)
        tl.store(h_ptr + at, (x * scale * weight).to(h_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    width: Tensor,
    out: Tensor,
    delta: Tensor | None = None,
    rows: int | None = None,
) -> None:
    """After the call ``out`` holds the norm of ``x + delta``, and ``x`` the sum.

    Args:
        x: (R, D); fp32 where a delta is added.
        weight: (D,).
        eps: added to the mean of squares.
        width: (1,) int32; later rows are left alone.
        out: (R, D), in the dtype to round to.
        delta: (R, D) fp32 or None.
        rows: programs to start, at least ``width``; R by default.
    """
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _add_rms_norm[(rows or x.shape[0],)](
        *(x, x if delta is None else delta, weight, out, width, size, eps),
        ADD=delta is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
        **turns(x),
    )

"""States between a boundary's slots and the rows of a pass, copied inside the pass's own graph.

    load_rows     x[r] ← states[slot + r]
    store_rows    states[slot + r] ← x[r]           for the plan's rows

Copies by slices would be launches of their own, each as dear to the host as the whole graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_rows(source_ptr, target_ptr, plan_ptr, size, LOAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row < tl.load(plan_ptr + 1):
        place = row.to(tl.int64) * size
        slot = (tl.load(plan_ptr) + row).to(tl.int64) * size
        lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = lane < size
        if LOAD:
            tl.store(target_ptr + place + lane, tl.load(source_ptr + slot + lane, mask=mask), mask)
        else:
            tl.store(target_ptr + slot + lane, tl.load(source_ptr + place + lane, mask=mask), mask)


def load_rows(states: Tensor, plan: Tensor, x: Tensor, rows: int | None = None) -> None:
    """After the call the plan's rows of ``x`` hold the states of their slots.

    The reference is ``x[:width] = states[slot : slot + width]``.

    Args:
        states: (S, D), by slot.
        plan: see :mod:`hispec_kernels.gpu.plan`.
        x: (R, D) of the same dtype; rows behind the plan's are left alone.
        rows: programs to start, at least the plan's width; R by default.
    """
    _copy(states, x, plan, rows or len(x), load=True)


def store_rows(x: Tensor, plan: Tensor, states: Tensor, rows: int | None = None) -> None:
    """After the call the slots of the plan's rows hold these rows of ``x``.

    The reference is ``states[slot : slot + width] = x[:width]``.

    Args:
        x: (R, D).
        plan: see :mod:`hispec_kernels.gpu.plan`.
        states: (S, D) of the same dtype, by slot.
        rows: programs to start, at least the plan's width; R by default.
    """
    _copy(x, states, plan, rows or len(x), load=False)


def _copy(source: Tensor, target: Tensor, plan: Tensor, rows: int, *, load: bool) -> None:
    size = source.shape[1]
    block = min(triton.next_power_of_2(size), 1024)
    _copy_rows[(rows, triton.cdiv(size, block))](
        *(source, target, plan, size), LOAD=load, BLOCK=block, num_warps=4
    )

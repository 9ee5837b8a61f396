"""A tree's kept nodes move, in all layers at once.

Moves go down and in order, each target below its source and above the targets before it. So a
program that owns some dimensions of one head may do them one by one, in place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.turns import take_turn, turns


@triton.jit
def _compact(
    cells_ptr,
    source_ptr,
    target_ptr,
    count_ptr,
    capacity,
    size,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    take_turn(TURNS)
    base = cells_ptr + tl.program_id(0).to(tl.int64) * capacity * size
    lane = tl.arange(0, BLOCK)
    mask = lane < size
    for i in range(tl.load(count_ptr)):
        source, target = tl.load(source_ptr + i), tl.load(target_ptr + i)
        cells = tl.load(base + source * size + lane, mask=mask)
        tl.store(base + target * size + lane, cells, mask=mask)


def compact(cells: Tensor, sources: Tensor, targets: Tensor, count: Tensor) -> None:
    """After the call slot ``targets[i]`` of all cells holds what ``sources[i]`` held, i < count.

    The reference is :func:`hispec_kernels.compact.compact`.

    Args:
        cells: (…, S, D_h), contiguous.
        sources: (N,) int64 slots, ascending.
        targets: (N,) int64 slots, ascending, each below its source.
        count: (1,) int64 or int32, at most N.
    """
    capacity, size = cells.shape[-2:]
    _compact[(cells.numel() // (capacity * size),)](
        *(cells, sources, targets, count, capacity, size),
        BLOCK=triton.next_power_of_2(size),
        num_warps=1,
        **turns(cells),
    )

"""The rows of a pass: where they come from and go to, inside of the pass's own graph.

    embed_rows    x[r] ← words[ids[r]]              for the plan's rows and ids
    load_rows     x[r] ← states[slot + r]
    store_rows    states[slot + r] ← x[r]
    add_features  x[r] += features[distance of r from the round's root]

Copies by slices would be launches of their own, each as dear to the host as the whole graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.plan import positions
from hispec_kernels.gpu.turns import take_turn, turns


@triton.jit
def _copy_rows(
    source_ptr,
    target_ptr,
    plan_ptr,
    size,
    TURNS: tl.constexpr,
    LOAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    take_turn(TURNS)
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


@triton.jit
def _embed_rows(words_ptr, x_ptr, plan_ptr, size, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    take_turn(TURNS)
    row = tl.program_id(0)
    if row < tl.load(plan_ptr + 1):
        word = tl.load(plan_ptr + 4 + row).to(tl.int64) * size
        lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = lane < size
        x = tl.load(words_ptr + word + lane, mask=mask).to(tl.float32)
        tl.store(x_ptr + row.to(tl.int64) * size + lane, x, mask)


@triton.jit
def _add_features(
    x_ptr, feature_ptr, plan_ptr, size, last, TURNS: tl.constexpr, BLOCK: tl.constexpr
):
    take_turn(TURNS)
    row = tl.program_id(0)
    if row < tl.load(plan_ptr + 1):
        distance = positions(plan_ptr, row, row >= 0) - tl.load(plan_ptr + 3)
        place = tl.minimum(tl.maximum(distance, 0), last)
        lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = lane < size
        at = x_ptr + row.to(tl.int64) * size + lane
        x = tl.load(at, mask=mask) + tl.load(feature_ptr + place * size + lane, mask=mask)
        tl.store(at, x, mask)


def embed_rows(words: Tensor, plan: Tensor, x: Tensor, rows: int | None = None) -> None:
    """After the call the plan's rows of ``x`` hold the embeddings of its ids.

    The reference is ``x[:width] = words[ids]``.

    Args:
        words: (V, D) of any floating dtype.
        plan: see :mod:`hispec_kernels.gpu.plan`; its ids are below V.
        x: (R, D) fp32; rows behind the plan's are left alone.
        rows: programs to start, at least the plan's width; R by default.
    """
    size = words.shape[1]
    block = min(triton.next_power_of_2(size), 1024)
    _embed_rows[(rows or len(x), triton.cdiv(size, block))](
        *(words, x, plan, size), BLOCK=block, num_warps=4, **turns(x)
    )


def load_rows(states: Tensor, plan: Tensor, x: Tensor, rows: int | None = None) -> None:
    """After the call the plan's rows of ``x`` hold the states of their slots.

    The reference is ``x[:width] = states[slot : slot + width]``.

    Args:
        states: (S, D), by slot.
        plan: see :mod:`hispec_kernels.gpu.plan`.
        x: (R, D) of a dtype to round to; rows behind the plan's are left alone.
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


def add_features(x: Tensor, features: Tensor, plan: Tensor, rows: int | None = None) -> None:
    """After the call the plan's rows of ``x`` have a feature more, each that of its distance.

    The reference is ``x[r] += features[min(max(position[r] - root, 0), K - 1)]``.

    Args:
        x: (R, D) fp32; rows behind the plan's are left alone.
        features: (K, D) fp32, by steps below the round's root.
        plan: see :mod:`hispec_kernels.gpu.plan`.
        rows: programs to start, at least the plan's width; R by default.
    """
    count, size = features.shape
    block = min(triton.next_power_of_2(size), 1024)
    _add_features[(rows or len(x), triton.cdiv(size, block))](
        *(x, features, plan, size, count - 1), BLOCK=block, num_warps=4, **turns(x)
    )


def _copy(source: Tensor, target: Tensor, plan: Tensor, rows: int, *, load: bool) -> None:
    size = source.shape[1]
    block = min(triton.next_power_of_2(size), 1024)
    _copy_rows[(rows, triton.cdiv(size, block))](
        *(source, target, plan, size), LOAD=load, BLOCK=block, num_warps=4, **turns(source)
    )

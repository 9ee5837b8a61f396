"""Rotary positions and the cache write; see :mod:`hispec_kernels.rope`.

A program turns eight heads of one row, in fp32, and puts queries into their buffer and keys and
values into the row's slot of the cache. Padding rows write nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.plan import positions
from hispec_kernels.gpu.turns import take_turn, turns

_HEADS = 8


@triton.jit
def _rope_write(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    plan_ptr,
    heads,
    kv_heads,
    kv_stride,
    TURNS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    take_turn(TURNS)
    row = tl.program_id(0)
    if row < tl.load(plan_ptr + 1):
        slot = tl.load(plan_ptr) + row
        position = positions(plan_ptr, row, row >= 0)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        lane = tl.arange(0, HALF)
        half = SIZE // 2
        inside = lane < half
        mask = (head[:, None] < heads + 2 * kv_heads) & inside[None, :]
        source = qkv_ptr + (row * (heads + 2 * kv_heads) + head[:, None]) * SIZE + lane[None, :]
        low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        table = position * SIZE + half + lane  # the half in which sines are positive
        cos = tl.load(cos_ptr + table, mask=inside, other=0.0)[None, :]
        sin = tl.load(sin_ptr + table, mask=inside, other=0.0)[None, :]
        turned_low = (low * cos - high * sin).to(q_ptr.dtype.element_ty)
        turned_high = (high * cos + low * sin).to(q_ptr.dtype.element_ty)

        queries = mask & (head[:, None] < heads)
        place = (row * heads + head[:, None]) * SIZE + lane[None, :]
        tl.store(q_ptr + place, turned_low, mask=queries)
        tl.store(q_ptr + place + half, turned_high, mask=queries)

        key = head[:, None] - heads
        keys = mask & (key >= 0) & (key < kv_heads)
        place = key.to(tl.int64) * kv_stride + slot * SIZE + lane[None, :]
        tl.store(k_ptr + place, turned_low, mask=keys)
        tl.store(k_ptr + place + half, turned_high, mask=keys)

        values = mask & (key >= kv_heads)
        place = (key - kv_heads).to(tl.int64) * kv_stride + slot * SIZE + lane[None, :]
        tl.store(v_ptr + place, low.to(v_ptr.dtype.element_ty), mask=values)
        tl.store(v_ptr + place + half, high.to(v_ptr.dtype.element_ty), mask=values)


def _cut(device: torch.device, heads: int) -> int:
    """Returns how many heads a program turns."""
    return _HEADS if device.type == "cuda" else triton.next_power_of_2(heads)


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: int | None = None,
) -> None:
    """After the call the plan's rows have their queries, and their slots their keys and values.

    Args:
        qkv: (R, (H + 2 H_kv) D_h) fp32: query heads, key heads, value heads.
        cos: (S, D_h) fp32, by position.
        sin: (S, D_h) fp32, the first half negated.
        plan: see :mod:`hispec_kernels.gpu.plan`.
        queries: (R, H, D_h) to fill.
        keys: (H_kv, S, D_h), one layer of the cache.
        values: likewise.
        rows: programs to start, at least the plan's width; R by default.
    """
    _, heads, size = queries.shape
    kv_heads = keys.shape[0]
    everything = heads + 2 * kv_heads
    together = _cut(qkv.device, everything)
    _rope_write[(rows or queries.shape[0], triton.cdiv(everything, together))](
        *(qkv, cos, sin, queries, keys, values, plan, heads, kv_heads, keys.stride(0)),
        SIZE=size,
        HALF=triton.next_power_of_2(size // 2),
        HEADS=together,
        num_warps=4,
        **turns(qkv),
    )

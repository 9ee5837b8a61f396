"""Attention of a pass's rows over the cache, in fixed splits of 128 positions merged in order.

    split i of a row:  m = max s,  l = Σ e^(s − m),  o = Σ e^(s − m) v     over positions 128 i …
    merged:            in order of i, into  Σ o / Σ l

:func:`hispec_kernels.attention.decode_attention` is the reference, in other words: flash-decoding
(Dao et al. 2023) whose splits are cut by position and never by length or width.

A row takes keys by position: before the root, position and slot are the same; behind it, the slot
of its own ancestor at that depth. So a branch is summed in the order in which plain decoding would
sum it, whatever stands between its slots. Keys before the root are the same for all rows and read
once: the query heads that share a KV head are packed with the rows into tiles of 16. The one or two
splits that hold tree nodes are gathered for each row by itself. Both are one piece of code, told by
numbers which of the two it does, so that they round alike.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.plan import positions
from hispec_kernels.gpu.turns import take_turn, turns

SPLIT = 128


# Not built anew for 1 or 16 splits: a graph's capture must find its kernels built.
@triton.jit(do_not_specialize=["splits"])
def _attend_split(
    q_ptr,
    k_ptr,
    v_ptr,
    plan_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    scale,
    heads,
    kv_stride,
    splits,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    take_turn(TURNS)
    job = tl.program_id(0)
    kv_head = tl.program_id(1)
    width = tl.load(plan_ptr + 1)
    root = tl.load(plan_ptr + 2)
    last = tl.load(plan_ptr) + width - 1  # the last row's slot
    on_tree = job >= splits
    mine = tl.where(on_tree, (job - splits) // 2, width - 1)
    split = tl.where(on_tree, root // 128 + (job - splits) % 2, job)
    begin = split * 128
    reach = tl.where(on_tree, positions(plan_ptr, mine, mine < width), last)
    wanted = tl.where(on_tree, mine < width, begin + 128 <= root) & (begin <= reach)
    if wanted:
        place = begin + tl.arange(0, 128)
        seen = place <= reach
        node = tl.load(plan_ptr) + mine - root
        behind = seen & (place >= tl.where(on_tree, root, 0x7FFFFFFF))
        hop = tl.load(plan_ptr + 68 + node * 32 + place - root, mask=behind, other=0)
        slots = tl.where(behind, root + hop, place)
        lane = tl.arange(0, BLOCK)
        inside = lane < SIZE
        base = kv_head.to(tl.int64) * kv_stride
        keys = tl.load(
            k_ptr + base + slots[None, :] * SIZE + lane[:, None],
            mask=inside[:, None] & seen[None, :],
            other=0.0,
        )
        values = tl.load(
            v_ptr + base + slots[:, None] * SIZE + lane[None, :],
            mask=seen[:, None] & inside[None, :],
            other=0.0,
        )
        tiles = tl.where(on_tree, 1, (width * GROUP + 15) // 16)
        for tile in range(tiles):
            packed = tile * 16 + tl.arange(0, 16)
            row = tl.where(on_tree, mine, packed // GROUP)
            head = kv_head * GROUP + tl.where(on_tree, packed, packed % GROUP)
            real = (row < width) & (head < (kv_head + 1) * GROUP)
            position = positions(plan_ptr, row, real)
            at = row * heads + head
            queries = tl.load(
                q_ptr + at[:, None] * SIZE + lane[None, :],
                mask=real[:, None] & inside[None, :],
                other=0.0,
            )
            scores = tl.dot(queries, keys, input_precision="ieee") * scale
            scores = tl.where(place[None, :] <= position[:, None], scores, float("-inf"))
            peak = tl.max(scores, 1)
            level = tl.where(peak == float("-inf"), 0.0, peak)
            weights = tl.exp2(scores - level[:, None])
            total = tl.sum(weights, 1)
            mixed = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            store = real & (position >= begin)
            at += split * ROWS * heads
            tl.store(max_ptr + at, peak, mask=store)
            tl.store(sum_ptr + at, total, mask=store)
            tl.store(
                out_ptr + at[:, None] * SIZE + lane[None, :],
                mixed,
                mask=store[:, None] & inside[None, :],
            )


@triton.jit
def _merge(
    max_ptr,
    sum_ptr,
    part_ptr,
    out_ptr,
    plan_ptr,
    heads,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    STEPS: tl.constexpr,
):
    take_turn(TURNS)
    row = tl.program_id(0)
    if row < tl.load(plan_ptr + 1):
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        splits = positions(plan_ptr, row, row >= 0) // 128 + 1
        lane = tl.arange(0, BLOCK)
        mask = (head[:, None] < heads) & (lane[None, :] < SIZE)
        peak = tl.full((HEADS,), float("-inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        mixed = tl.zeros((HEADS, BLOCK), tl.float32)
        for start in range(0, splits, STEPS):
            # Several at a time, so that their loads overlap; what is past the end adds nothing.
            for step in tl.static_range(STEPS):
                split = start + step
                at = (split * ROWS + row) * heads + head
                real = tl.where(split < splits, heads, 0)
                there = head < real
                other_peak = tl.load(max_ptr + at, mask=there, other=float("-inf"))
                other_total = tl.load(sum_ptr + at, mask=there, other=0.0)
                place = part_ptr + at[:, None] * SIZE + lane[None, :]
                other = tl.load(place, mask=mask & there[:, None], other=0.0)
                higher = tl.maximum(peak, other_peak)
                level = tl.where(higher == float("-inf"), 0.0, higher)  # heads that are not there
                keep, take = tl.exp2(peak - level), tl.exp2(other_peak - level)
                mixed = mixed * keep[:, None] + other * take[:, None]
                total = total * keep + other_total * take
                peak = higher
        total = tl.where(head < heads, total, 1.0)
        out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * heads + head[:, None]) * SIZE + lane[None, :], out, mask=mask)


class Partials:
    """What splits leave for merging: room for ``splits`` of them over ``rows`` rows."""

    def __init__(self, splits: int, rows: int, heads: int, size: int, device: torch.device) -> None:
        self.splits = splits
        self.peaks = torch.empty(splits, rows, heads, device=device)
        self.sums = torch.empty(splits, rows, heads, device=device)
        self.mixed = torch.empty(splits, rows, heads, size, device=device)


def _cut(device: torch.device, heads: int) -> tuple[int, int]:
    """Returns how many heads, and splits at a time, a merging program takes: tuning, not bits."""
    if device.type == "cpu":  # the interpreter pays by the operation
        return triton.next_power_of_2(heads), 1
    return 1, 4


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Tensor,
    partials: Partials,
    out: Tensor,
    *,
    tree: bool,
    rows: int | None = None,
) -> None:
    """After the call ``out`` holds what the plan's rows see of the cache, scaled by 1 / √D_h.

    Args:
        queries: (R, H, D_h), rotated.
        keys: (H_kv, S, D_h); positions no row may see can hold anything finite.
        values: (H_kv, S, D_h).
        plan: see :mod:`hispec_kernels.gpu.plan`.
        partials: room for all splits up to the last row's position.
        out: (R, H, D_h) to fill, in the queries' dtype.
        tree: whether the plan's root is one; otherwise slots are positions.
        rows: rows to start programs for, at least the plan's width; R by default.
    """
    width, heads, size = queries.shape
    kv_heads = keys.shape[0]
    started = rows or width
    block = max(16, triton.next_power_of_2(size))
    parts = (partials.peaks, partials.sums, partials.mixed)
    _attend_split[(partials.splits + 2 * started * tree, kv_heads)](
        *(queries, keys, values, plan, *parts),
        *(math.log2(math.e) / math.sqrt(size), heads, keys.stride(0), partials.splits),
        ROWS=width,
        GROUP=heads // kv_heads,
        SIZE=size,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
        **turns(queries),
    )
    together, steps = _cut(queries.device, heads)
    _merge[(started, triton.cdiv(heads, together))](
        *(*parts, out, plan, heads),
        ROWS=width,
        SIZE=size,
        BLOCK=block,
        HEADS=together,
        STEPS=steps,
        num_warps=1,
        **turns(queries),
    )

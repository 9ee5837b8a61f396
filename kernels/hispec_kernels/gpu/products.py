"""Narrow matrix products: up to 32 rows times a weight matrix that is read once.

    y = x Wᵀ (+ bias) (+ residual)                product
    y = silu(x W_gateᵀ) · (x W_upᵀ)               gated_product: the SwiGLU in the same pass

A program owns some rows of W, all of K. Decoding is bound by reading W, so what counts is that its
loads are long, many and in flight early: W streams through a software pipeline past the tensor
cores, while x, a few kilobytes, comes from the L2 cache.

A tile has 16 rows of x, whether one of them is real or all; 17 rows and more take a second tile
against the same piece of W. So a row's bits do not depend on its company: every row is summed over
the same pieces of K in the same order, by the same instruction. Splitting K over programs would
help matrices of few rows; by the matrix' shape it would be as exact, by the width it would not.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.turns import take_turn, turns

#: Rows of x in one tile.
TILE = 16


@triton.jit
def dots(
    x_ptr,
    w_ptr,
    n,
    width,
    rows,
    size,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Returns x W[n]ᵀ of the first 16 rows and, where there are two tiles, of the second."""
    at = tl.arange(0, 16)
    lane = tl.arange(0, BLOCK_K)
    first = tl.zeros((16, BLOCK_N), tl.float32)
    second = tl.zeros((16, BLOCK_N), tl.float32)
    w_at = w_ptr + n[None, :].to(tl.int64) * size + lane[:, None]
    x_at = x_ptr + at[:, None] * size + lane[None, :]
    inside = n[None, :] < rows
    for start in range(0, size, BLOCK_K):
        if EVEN:
            w_mask = inside
            x_mask = at[:, None] < width
            x_mask_2 = at[:, None] + 16 < width
        else:
            w_mask = inside & (start + lane[:, None] < size)
            x_mask = (at[:, None] < width) & (start + lane[None, :] < size)
            x_mask_2 = (at[:, None] + 16 < width) & (start + lane[None, :] < size)
        w = tl.load(w_at + start, mask=w_mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + start, mask=x_mask, other=0.0, eviction_policy="evict_last")
        first = tl.dot(x, w, first, input_precision="ieee")
        if TILES == 2:
            x = tl.load(x_at + 16 * size + start, mask=x_mask_2, other=0.0)
            second = tl.dot(x, w, second, input_precision="ieee")
    return first, second


@triton.jit
def _finish(y, y_ptr, bias_ptr, residual_ptr, n, at, width, rows, BIAS, RESIDUAL):
    """Stores a tile of results, bias and residual added in this order."""
    mask = (at[:, None] < width) & (n[None, :] < rows)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    place = at[:, None] * rows + n[None, :]
    if RESIDUAL:
        y = tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32) + y
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    width_ptr,
    rows,
    size,
    TURNS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    take_turn(TURNS)
    width = tl.load(width_ptr)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, 16)
    first, second = dots(x_ptr, w_ptr, n, width, rows, size, TILES, BLOCK_N, BLOCK_K, EVEN)
    _finish(first, y_ptr, bias_ptr, residual_ptr, n, at, width, rows, BIAS, RESIDUAL)
    if TILES == 2:
        _finish(second, y_ptr, bias_ptr, residual_ptr, n, at + 16, width, rows, BIAS, RESIDUAL)


@triton.jit
def _gate(gate, up, gate_bias, up_bias, y_ptr, n, at, width, rows, BIAS):
    """Stores silu(gate) · up of a tile."""
    if BIAS:
        gate += gate_bias[None, :]
        up += up_bias[None, :]
    y = gate / (1.0 + tl.exp(-gate)) * up
    mask = (at[:, None] < width) & (n[None, :] < rows)
    tl.store(y_ptr + at[:, None] * rows + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_product(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    width_ptr,
    rows,
    size,
    TURNS: tl.constexpr,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    take_turn(TURNS)
    width = tl.load(width_ptr)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, 16)
    lane = tl.arange(0, BLOCK_K)
    gate = tl.zeros((16, BLOCK_N), tl.float32)
    up = tl.zeros((16, BLOCK_N), tl.float32)
    gate_2 = tl.zeros((16, BLOCK_N), tl.float32)
    up_2 = tl.zeros((16, BLOCK_N), tl.float32)
    inside = n[None, :] < rows
    gate_at = w_ptr + n[None, :].to(tl.int64) * size + lane[:, None]
    up_at = gate_at + rows.to(tl.int64) * size
    x_at = x_ptr + at[:, None] * size + lane[None, :]
    for start in range(0, size, BLOCK_K):
        if EVEN:
            w_mask = inside
            x_mask = at[:, None] < width
            x_mask_2 = at[:, None] + 16 < width
        else:
            w_mask = inside & (start + lane[:, None] < size)
            x_mask = (at[:, None] < width) & (start + lane[None, :] < size)
            x_mask_2 = (at[:, None] + 16 < width) & (start + lane[None, :] < size)
        w = tl.load(gate_at + start, mask=w_mask, other=0.0, eviction_policy="evict_first")
        v = tl.load(up_at + start, mask=w_mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + start, mask=x_mask, other=0.0, eviction_policy="evict_last")
        gate = tl.dot(x, w, gate, input_precision="ieee")
        up = tl.dot(x, v, up, input_precision="ieee")
        if TILES == 2:
            x = tl.load(x_at + 16 * size + start, mask=x_mask_2, other=0.0)
            gate_2 = tl.dot(x, w, gate_2, input_precision="ieee")
            up_2 = tl.dot(x, v, up_2, input_precision="ieee")
    gate_bias = tl.zeros((BLOCK_N,), tl.float32)
    up_bias = tl.zeros((BLOCK_N,), tl.float32)
    if BIAS:
        gate_bias = tl.load(bias_ptr + n, mask=n < rows, other=0.0).to(tl.float32)
        up_bias = tl.load(bias_ptr + rows + n, mask=n < rows, other=0.0).to(tl.float32)
    _gate(gate, up, gate_bias, up_bias, y_ptr, n, at, width, rows, BIAS)
    if TILES == 2:
        _gate(gate_2, up_2, gate_bias, up_bias, y_ptr, n, at + 16, width, rows, BIAS)


class Blocks(dict[str, int]):
    """``BLOCK_N``, ``BLOCK_K``, ``num_warps`` and ``num_stages`` of a product: tuning, not bits."""


def blocks_for(weight: Tensor, rows: int) -> Blocks:
    """Returns how a matrix is cut into programs; by its shape alone, never by the width.

    Args:
        weight: (N, K).
        rows: N, or N / 2 for a gated product.
    """
    size = weight.shape[1]
    if weight.device.type == "cpu":  # the interpreter pays by the operation, not by the element
        return Blocks(BLOCK_N=128, BLOCK_K=min(128, _power(size)), num_warps=4, num_stages=1)
    narrow = 32 if rows >= 32 * 128 else 16  # about one program for each of 132 processors
    wide = min(256 if weight.dtype.itemsize == 2 else 64, _power(size))
    # Each stage but the one at work holds its piece of 32 rows of x, of W, and of the gate's twin.
    piece, stages = (2 * TILE + 2 * narrow) * weight.dtype.itemsize, 4
    while (stages - 1) * piece * wide > _shared_memory(weight.device):
        wide //= 2
    return Blocks(BLOCK_N=narrow, BLOCK_K=wide, num_warps=4, num_stages=stages)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Returns how many bytes of shared memory one program may have: 227 KiB of an H100's."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def product(
    x: Tensor,
    weight: Tensor,
    width: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    blocks: Blocks | None = None,
) -> None:
    """After the call ``out`` holds x weightᵀ + bias + residual in its first ``width`` rows.

    The reference is ``F.linear``, summed in fp32.

    Args:
        x: (R, K), R = 16 or 32; rows from ``width`` on are not read.
        weight: (N, K), in x's dtype.
        width: (1,) int32 on the device, 1 … R.
        out: (R, N) fp32, or any dtype to round to; may be ``residual``.
        bias: (N,) or None.
        residual: (R, N) or None.
        blocks: how to cut it; by default :func:`blocks_for`.
    """
    rows, size = weight.shape
    cut = blocks or blocks_for(weight, rows)
    _product[(triton.cdiv(rows, cut["BLOCK_N"]),)](
        x,
        weight,
        weight if bias is None else bias,
        out if residual is None else residual,
        out,
        width,
        rows,
        size,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        TILES=x.shape[0] // TILE,
        EVEN=size % cut["BLOCK_K"] == 0,
        **cut,
        **turns(x),
    )


def gated_product(
    x: Tensor,
    weight: Tensor,
    width: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    blocks: Blocks | None = None,
) -> None:
    """After the call ``out`` holds silu(x gateᵀ) · (x upᵀ) in its first ``width`` rows.

    The reference is :func:`hispec_kernels.swiglu.swiglu` of ``F.linear``; here gate and up are not
    rounded in between.

    Args:
        x: (R, K), R = 16 or 32.
        weight: (2 I, K), the gate's rows first.
        width: (1,) int32.
        out: (R, I).
        bias: (2 I,) or None.
        blocks: how to cut it; by default :func:`blocks_for`.
    """
    rows, size = weight.shape[0] // 2, weight.shape[1]
    cut = blocks or blocks_for(weight, rows)
    _gated_product[(triton.cdiv(rows, cut["BLOCK_N"]),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        width,
        rows,
        size,
        BIAS=bias is not None,
        TILES=x.shape[0] // TILE,
        EVEN=size % cut["BLOCK_K"] == 0,
        **cut,
        **turns(x),
    )

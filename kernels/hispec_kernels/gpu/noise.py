"""Counter-based Gumbel noise; the integers are those of :mod:`hispec_kernels.noise`.

The seed's own mixing is the host's: kernels get its 32 bits, ``seeded``, in an int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.turns import take_turn, turns
from hispec_kernels.noise import seeded_state

_BLOCK = 1024


@triton.jit
def mix(x):
    """Returns lowbias32 of uint32 values."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hash32(seeded, position, token):
    """Returns 32 mixed bits for uint32 positions and tokens."""
    row = mix(seeded + position)
    return mix(row ^ mix(token * 0x9E3779B9 + 0x7F4A7C15))


@triton.jit
def gumbel(seeded, position, token):
    """Returns standard Gumbel noise for uint32 positions and tokens."""
    bits = hash32(seeded, position, token)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
    return -tl.log(-tl.log(uniform))


@triton.jit
def _noisy(
    logits_ptr,
    out_ptr,
    position_ptr,
    token_ptr,
    seeded_ptr,
    temperature,
    size,
    token_stride,
    TURNS: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    take_turn(TURNS)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    token = column.to(tl.uint32)
    if IDS:
        token = tl.load(token_ptr + row * token_stride + column, mask=mask, other=0).to(tl.uint32)
    position = tl.load(position_ptr + row).to(tl.uint32)
    noise = gumbel(tl.load(seeded_ptr).to(tl.uint32), position, token)
    logits = tl.load(logits_ptr + row * size + column, mask=mask, other=0.0)
    tl.store(out_ptr + row * size + column, logits / temperature + noise, mask=mask)


def noisy(
    logits: Tensor, temperature: float, seed: int, positions: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Returns ``logits / temperature`` plus noise; see :func:`hispec_kernels.noise.noisy`.

    Args:
        logits: (T, V) fp32.
        temperature: > 0.
        seed: any integer.
        positions: (T,) int64.
        tokens: (V,) or (T, V) int64; None where they are the columns.
    """
    rows, size = logits.shape
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    if tokens is not None:
        tokens = tokens.contiguous()
    _noisy[(rows, triton.cdiv(size, _BLOCK))](
        *(logits, out, positions.contiguous(), positions if tokens is None else tokens),
        torch.full((1,), seeded_state(seed), dtype=torch.int64, device=logits.device),
        *(float(temperature), size, size if tokens is not None and tokens.dim() == 2 else 0),
        IDS=tokens is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        **turns(logits),
    )
    return out

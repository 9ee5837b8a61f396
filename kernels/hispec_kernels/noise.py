"""Gumbel noise as a pure function of (seed, position, token): the same for whoever asks.

    bits = mix(mix(mix(seed_lo, seed_hi), position), token)    32-bit integers, exact on any device
    u    = (bits >> 9 + ½) · 2⁻²³                              in (0, 1), never 0 or 1
    g    = −log(−log u)

``argmax(logits + g)`` is a sample of softmax(logits) (Gumbel-max). Every level of a hierarchy adds
the same noise at the same position, which makes their picks agree as often as their distributions
allow (Gumbel coupling: Daliri et al., arXiv 2408.07978).

``mix`` is the finaliser of murmur3 with constants of Chris Wellons' hash-prospector search
("lowbias32": bias 0.17 against 0.26), applied to the sum of the running state and the new word.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """lowbias32 on int64 tensors that hold 32-bit values; products stay below 2⁶³ in two halves."""
    x = x ^ (x >> 16)
    x = _mul32(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _mul32(x, 0x846CA68B)
    return x ^ (x >> 16)


def _mul32(x: Tensor, factor: int) -> Tensor:
    # 32 x 32 bits overflow int64's sign; int64 products wrap modulo 2^64 alike on every device,
    # and the low 32 bits of a wrapped product are right.
    return (x * factor) & _MASK


def hash32(seed: int, positions: Tensor, tokens: Tensor) -> Tensor:
    """Returns 32 well-mixed bits for each (position, token) pair under ``seed``.

    Args:
        seed: any integer; its low 64 bits count.
        positions: int64 tensor, broadcastable with ``tokens``; absolute positions ≥ 0.
        tokens: int64 tensor of token ids in the full vocabulary.

    Returns:
        int64 tensor with values in [0, 2³²).
    """
    state = torch.full((), seed & _MASK, dtype=torch.int64, device=positions.device)
    state = _mix(state)
    state = _mix((state + ((seed >> 32) & _MASK)) & _MASK)
    rows = _mix((state + positions) & _MASK)
    # The golden-ratio step separates tokens before the add, so that (position, token) and
    # (position + 1, token - 1) share nothing.
    return _mix(rows ^ _mix((_mul32(tokens, 0x9E3779B9) + 0x7F4A7C15) & _MASK))


def gumbel(seed: int, positions: Tensor, tokens: Tensor) -> Tensor:
    """Returns standard Gumbel noise in fp32, between about −2.8 and 16.6.

    Args:
        seed: as in :func:`hash32`.
        positions: (..., 1) int64.
        tokens: (V,) int64, broadcast against ``positions``.
    """
    bits = hash32(seed, positions, tokens)
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))

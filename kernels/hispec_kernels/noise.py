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

import ctypes
import functools

import torch
from torch import Tensor

from hispec_kernels import cpu, gpu

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


@functools.lru_cache(64)
def seeded_state(seed: int) -> int:
    """Returns the 32 bits that stand for a seed, of which the low 64 count."""
    state = _mix(torch.tensor(seed & _MASK))
    return int(_mix((state + ((seed >> 32) & _MASK)) & _MASK))


def hash32(seed: int, positions: Tensor, tokens: Tensor) -> Tensor:
    """Returns 32 well-mixed bits for each (position, token) pair under ``seed``.

    Args:
        seed: any integer; its low 64 bits count.
        positions: int64 tensor, broadcastable with ``tokens``; absolute positions ≥ 0.
        tokens: int64 tensor of token ids in the full vocabulary.

    Returns:
        int64 tensor with values in [0, 2³²).
    """
    rows = _mix((seeded_state(seed) + positions) & _MASK)
    # The golden-ratio step separates tokens before the add, so that (position, token) and
    # (position + 1, token - 1) share nothing.
    return _mix(rows ^ _mix((_mul32(tokens, 0x9E3779B9) + 0x7F4A7C15) & _MASK))


def gumbel(seed: int, positions: Tensor, tokens: Tensor) -> Tensor:
    """Returns standard Gumbel noise in fp32, between about −2.8 and 16.6.

    Args:
        seed: as in :func:`hash32`.
        positions: (..., 1) int64.
        tokens: (V,) int64, broadcast against ``positions``; or (..., V).
    """
    shape = torch.broadcast_shapes(positions.shape, tokens.shape)
    library = cpu.in_use(positions, tokens)
    if library is not None and positions.shape[-1:] == (1,):
        return _compiled(library, None, 1.0, seed, positions, tokens, shape)
    bits = hash32(seed, positions, tokens)
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def noisy(
    logits: Tensor, temperature: float, seed: int, positions: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Returns ``logits / temperature + gumbel(seed, positions, tokens)`` to the bit: (..., V).

    Args:
        logits: (..., V) fp32.
        temperature: > 0.
        seed: as in :func:`hash32`.
        positions: (..., 1) int64.
        tokens: (V,) or (..., V) int64; None where they are the columns.
    """
    if logits.is_cuda and not gpu.why_not(logits.device):
        from hispec_kernels.gpu.noise import noisy as on_gpu

        rows = logits.float().reshape(-1, logits.shape[-1])
        at = positions.expand(*logits.shape[:-1], 1).reshape(-1)
        if tokens is not None and tokens.dim() > 1:
            tokens = tokens.expand(logits.shape).reshape(rows.shape)
        return on_gpu(rows, temperature, seed, at, tokens).view(logits.shape)
    library = cpu.in_use(logits, positions)
    if library is not None and logits.dtype == torch.float32 and positions.shape[-1:] == (1,):
        return _compiled(library, logits, temperature, seed, positions, tokens, logits.shape)
    if tokens is None:
        tokens = torch.arange(logits.shape[-1], device=logits.device)
    return logits / temperature + gumbel(seed, positions, tokens)


def _compiled(
    library: ctypes.CDLL,
    logits: Tensor | None,
    temperature: float,
    seed: int,
    positions: Tensor,
    tokens: Tensor | None,
    shape: torch.Size,
) -> Tensor:
    """:func:`noisy`, or :func:`gumbel` without logits, by the library."""
    out = torch.empty(shape)
    at = positions.to(torch.int64).expand(*shape[:-1], 1).contiguous()
    if logits is not None:
        logits = logits.contiguous()
    if tokens is not None:
        whole = tokens.numel() == shape[-1]
        tokens = (tokens if whole else tokens.expand(shape)).to(torch.int64).contiguous()
    library.gumbel(
        *(None if logits is None else logits.data_ptr(), temperature, seed & (2**64 - 1)),
        *(at.data_ptr(), None if tokens is None else tokens.data_ptr()),
        *(0 if tokens is None or whole else shape[-1], at.numel(), shape[-1]),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out

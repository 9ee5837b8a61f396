"""Rotary positions and the cache write, in one step (Su et al. 2021, RoFormer).

    rotate(x)[d] = x[d] cos[d] + x[(d + D_h/2) mod D_h] sin[d]      sin carries the sign: −, then +

The signed table turns the usual ``rotate_half`` with its concatenation into a roll.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, queries: Tensor, keys: Tensor, values: Tensor
) -> None:
    """After the call ``queries`` and ``keys`` hold what was rotated, and ``values`` the values.

    Args:
        qkv: (W, H + 2 H_kv, D_h), the fused projection: query heads, key heads, value heads.
        cos: (W, 1, D_h), cosines at each row's position.
        sin: (W, 1, D_h), sines, the first half negated.
        queries: (H_kv, W, G, D_h) view to fill, G = H / H_kv; query head ``g * G + j`` reads KV
            head ``g``.
        keys: (H_kv, W, D_h) view of the cache to fill.
        values: (H_kv, W, D_h) view of the cache to fill.
    """
    kv_heads, group = queries.shape[0], queries.shape[2]
    heads = kv_heads * group
    rotated = rotate(qkv[:, : heads + kv_heads], cos, sin)  # (W, H + H_kv, D_h)
    queries.copy_(rotated[:, :heads].unflatten(1, (kv_heads, group)).transpose(0, 1))
    keys.copy_(rotated[:, heads:].transpose(0, 1))
    values.copy_(qkv[:, heads + kv_heads :].transpose(0, 1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns ``x`` (W, heads, D_h) turned by its rows' angles; tables as in :func:`rope_write`."""
    return torch.roll(x, x.shape[-1] // 2, -1).mul_(sin).addcmul_(x, cos)

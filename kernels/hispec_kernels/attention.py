"""Attention of a few new tokens over a cache, such that a row's bits do not depend on its company.

The query heads that share a KV head are packed as rows of one matrix, so the cache is read once
(torch's own ``enable_gqa`` repeats it: 2 to 4 times slower here at 16 rows and fewer).

Exactness. On a CPU, torch's flash attention walks the keys in fixed splits of 512 positions and
merges the partials in order, which is what makes a row independent of masked positions behind it.
Two things around that would still change bits, and both are excluded by shape (measured over all
lengths to 2,176 and all row counts to 64, fp32 and bf16, heads of 64 and 128, one and two threads;
the law test repeats the scan):

- fewer than 6 rows, or a remainder of fewer than 6 above a block of 32, take other micro-kernels:
  rows are padded to a multiple of ``ROWS`` = 8;
- a last split that is not whole rounds otherwise than the same one filled up with masked positions,
  of 384 on an Intel CPU in fp32, of 256 on an AMD one in either dtype: key lengths are padded to a
  multiple of ``BUCKET`` = 512.

A masked position *between* a row's own shifts what is added when, and changes bits too. So a tree's
branch must lie in order, where plain decoding would have it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROWS = 8
BUCKET = 512


def decode_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Returns softmax(scale · queries keysᵀ + mask) values.

    Args:
        queries: (H_kv, R, D_h), R = rows packed over the heads of a group and the new tokens.
        keys: (H_kv, S, D_h), S a multiple of ``BUCKET`` for exact numerics. Masked positions may
            hold anything finite.
        values: (H_kv, S, D_h).
        mask: (R, S), 0 where a row may look and -inf elsewhere, in the queries' dtype.
        scale: 1 / sqrt(D_h) as a rule.

    Returns:
        (H_kv, R, D_h).
    """
    with _unplanned() if queries.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, scale=scale
        )[0]


def _unplanned() -> AbstractContextManager[object]:
    """Leaves out cuDNN's, torch's first choice on Hopper, which plans for each prompt's length."""
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )

"""The k largest logits of each row, in order; see :mod:`hispec_kernels.top_k`.

torch's own ``topk`` leaves open which of equal entries comes first, and setting that right takes a
look from the host. Here each piece of a row leaves its k best and a second kernel ranks those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.turns import take_turn, turns

_PIECE = 4096


@triton.jit
def _best(
    value_ptr,
    column_ptr,
    best_ptr,
    place_ptr,
    size,
    pieces,
    TURNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the k best of one piece of a row; ``column_ptr`` names columns if COLUMNS."""
    take_turn(TURNS)
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    values = tl.load(value_ptr + row * size + at, mask=there, other=float("-inf")).to(tl.float32)
    columns = tl.where(there, at, 0x7FFFFFFF)
    if COLUMNS:
        columns = tl.load(column_ptr + row * size + at, mask=there, other=0x7FFFFFFF)
    for rank in tl.static_range(K):
        best = tl.max(values, 0)
        column = tl.min(tl.where(values == best, columns, 0x7FFFFFFF), 0)
        out = (row * pieces + piece) * K + rank
        tl.store(best_ptr + out, best)
        # Where all is NaN no column is the best, and any will do that can be looked up.
        place = tl.where((column == 0x7FFFFFFF) & (pieces == 1), 0, column)
        tl.store(place_ptr + out, place.to(place_ptr.dtype.element_ty))
        taken = columns == column
        values = tl.where(taken, float("-inf"), values)
        columns = tl.where(taken, 0x7FFFFFFF, columns)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the largest entries of each row, descending; of equal ones the lowest column first.

    Args:
        logits: (T, V) fp32, on the device.
        k: 1 … V, 64 at most.

    Returns:
        values (T, k) fp32 and columns (T, k) int64.
    """
    rows = logits.shape[0]
    logits = logits.contiguous()
    values, columns = logits, None
    while columns is None or values.shape[1] > k:
        length = values.shape[1]
        pieces = triton.cdiv(length, _PIECE)
        kind = torch.int64 if pieces == 1 else torch.int32
        best = torch.empty(rows, pieces * k, device=logits.device)
        place = torch.empty(rows, pieces * k, dtype=kind, device=logits.device)
        _best[(rows, pieces)](
            *(values, values if columns is None else columns, best, place, length, pieces),
            COLUMNS=columns is not None,
            K=k,
            BLOCK=min(_PIECE, triton.next_power_of_2(length)),
            num_warps=8,
            **turns(logits),
        )
        values, columns = best, place
        if pieces == 1:
            break
    return values, columns

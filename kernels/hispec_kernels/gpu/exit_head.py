"""An exit's head to its end: vocabulary product, noise and the k best, the logits never stored.

    score = logit / temperature (+ gumbel)           who is best
    odds  = softmax(logit / temperature)             how likely it is, without the noise

:func:`hispec_kernels.exit_head.best` is the reference. A program takes a piece of the vocabulary to
its k best and its share of Σ exp; a second kernel ranks the pieces' candidates, of equal scores the
lowest column first, and sums the shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.noise import gumbel
from hispec_kernels.gpu.products import TILE, Blocks, blocks_for, dots
from hispec_kernels.gpu.turns import take_turn, turns


@triton.jit
def _candidates(
    logits,
    score_ptr,
    logit_ptr,
    column_ptr,
    peak_ptr,
    share_ptr,
    sampling_ptr,
    id_ptr,
    n,
    at,
    width,
    rows,
    inverse,
    pieces,
    NOISE: tl.constexpr,
    IDS: tl.constexpr,
    K: tl.constexpr,
):
    """Stores the k best of one piece of the vocabulary for 16 rows."""
    inside = n[None, :] < rows
    real = at < width
    scaled = tl.where(inside, logits * inverse, float("-inf"))
    scores = scaled
    if NOISE:
        token = n.to(tl.uint32)
        if IDS:
            token = tl.load(id_ptr + n, mask=n < rows, other=0).to(tl.uint32)
        position = tl.load(sampling_ptr + 1 + at, mask=real, other=0).to(tl.uint32)
        seeded = tl.load(sampling_ptr).to(tl.uint32)
        scores = scaled + gumbel(seeded, position[:, None], token[None, :])
        scores = tl.where(inside, scores, float("-inf"))
    piece = tl.program_id(0)
    place = at * pieces + piece
    peak = tl.max(scaled, 1)
    share = tl.sum(tl.exp(scaled - peak[:, None]), 1)
    tl.store(peak_ptr + place, peak, mask=real)
    tl.store(share_ptr + place, share, mask=real)
    # No column: beyond the vocabulary, taken already, or what stands where all scores are NaN.
    columns = tl.where(inside, n[None, :], 0x7FFFFFFF)
    columns = tl.broadcast_to(columns, scores.shape)
    for rank in tl.static_range(K):
        best = tl.max(scores, 1)
        column = tl.min(tl.where(scores == best[:, None], columns, 0x7FFFFFFF), 1)
        taken = columns == column[:, None]
        logit = tl.sum(tl.where(taken, scaled, 0.0), 1)
        tl.store(score_ptr + place * K + rank, best, mask=real)
        tl.store(logit_ptr + place * K + rank, logit, mask=real)
        tl.store(column_ptr + place * K + rank, column, mask=real)
        scores = tl.where(taken, float("-inf"), scores)
        columns = tl.where(taken, 0x7FFFFFFF, columns)


@triton.jit
def _head(
    x_ptr,
    w_ptr,
    score_ptr,
    logit_ptr,
    column_ptr,
    peak_ptr,
    share_ptr,
    sampling_ptr,
    temperature_ptr,
    id_ptr,
    width_ptr,
    rows,
    size,
    pieces,
    TURNS: tl.constexpr,
    NOISE: tl.constexpr,
    IDS: tl.constexpr,
    K: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    take_turn(TURNS)
    width = tl.load(width_ptr)
    inverse = 1.0 / tl.load(temperature_ptr)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, 16)
    first, second = dots(x_ptr, w_ptr, n, width, rows, size, TILES, BLOCK_N, BLOCK_K, EVEN)
    for tile in tl.static_range(TILES):
        _candidates(
            first if tile == 0 else second,
            score_ptr,
            logit_ptr,
            column_ptr,
            peak_ptr,
            share_ptr,
            sampling_ptr,
            id_ptr,
            n,
            at + tile * 16,
            width,
            rows,
            inverse,
            pieces,
            NOISE,
            IDS,
            K,
        )


@triton.jit
def _rank(
    score_ptr,
    logit_ptr,
    column_ptr,
    peak_ptr,
    share_ptr,
    id_ptr,
    best_ptr,
    odds_ptr,
    width_ptr,
    pieces,
    TURNS: tl.constexpr,
    IDS: tl.constexpr,
    K: tl.constexpr,
    PIECES: tl.constexpr,
):
    take_turn(TURNS)
    row = tl.program_id(0)
    if row < tl.load(width_ptr):
        piece = tl.arange(0, PIECES)
        there = piece < pieces
        peaks = tl.load(peak_ptr + row * pieces + piece, mask=there, other=float("-inf"))
        shares = tl.load(share_ptr + row * pieces + piece, mask=there, other=0.0)
        peak = tl.max(peaks, 0)
        total = tl.sum(shares * tl.exp(peaks - peak), 0)
        # A piece's candidates are in order, so the best of all is among the pieces' next ones.
        at = (row * pieces + piece) * K
        scores = tl.load(score_ptr + at, mask=there, other=float("-inf"))
        columns = tl.load(column_ptr + at, mask=there, other=0x7FFFFFFF)
        last = at + K
        for rank in tl.static_range(K):
            best = tl.max(scores, 0)
            column = tl.min(tl.where(scores == best, columns, 0x7FFFFFFF), 0)
            known = column != 0x7FFFFFFF  # else all is NaN: any id will do that can be looked up
            taken = (columns == column) & known
            logit = tl.sum(tl.load(logit_ptr + at, mask=taken, other=0.0), 0)
            column = tl.where(known, column, 0)
            token = column.to(tl.int64)
            if IDS:
                token = tl.load(id_ptr + column)
            tl.store(best_ptr + row * K + rank, token)
            tl.store(odds_ptr + row * K + rank, tl.where(known, tl.exp(logit - peak) / total, 0.0))
            at += taken.to(tl.int32)
            more = taken & (at < last)
            scores = tl.where(
                taken, tl.load(score_ptr + at, mask=more, other=float("-inf")), scores
            )
            columns = tl.where(
                taken, tl.load(column_ptr + at, mask=more, other=0x7FFFFFFF), columns
            )


class Candidates:
    """Room for what the pieces of a vocabulary leave for ranking."""

    def __init__(self, pieces: int, rows: int, k: int, device: torch.device) -> None:
        self.scores = torch.empty(rows, pieces, k, device=device)
        self.logits = torch.empty(rows, pieces, k, device=device)
        self.columns = torch.empty(rows, pieces, k, dtype=torch.int32, device=device)
        self.peaks = torch.empty(rows, pieces, device=device)
        self.shares = torch.empty(rows, pieces, device=device)


def best(
    x: Tensor,
    weight: Tensor,
    width: Tensor,
    k: int,
    temperature: Tensor,
    sampling: Tensor | None = None,
    ids: Tensor | None = None,
    blocks: Blocks | None = None,
    rows: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the k best ids of each row under the noise, and their odds without it.

    Args:
        x: (R, D), normalised; R = 16 or 32.
        weight: (V, D), in x's dtype.
        width: (1,) int32; of later rows nothing is written.
        k: 1 … 16.
        temperature: (1,) fp32.
        sampling: (1 + R,) integers: the bits of :func:`hispec_kernels.noise.seeded_state`, then
            each row's position; None is without noise.
        ids: (V,) int64, the columns' ids; None where the columns are the ids.
        blocks: how to cut the product; by default by its shape.
        rows: rows to start programs for, at least ``width``; R by default.
        out: what to fill instead of new memory.

    Returns:
        ids (R, k) int64 and odds (R, k) fp32.
    """
    count, size = weight.shape
    cut = blocks or blocks_for(weight, count)
    pieces = triton.cdiv(count, cut["BLOCK_N"])
    room = Candidates(pieces, x.shape[0], k, x.device)
    found = out or (
        torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device),
        torch.empty(x.shape[0], k, device=x.device),
    )
    parts = (room.scores, room.logits, room.columns, room.peaks, room.shares)
    table = found[0] if ids is None else ids
    _head[(pieces,)](
        *(x, weight, *parts, width if sampling is None else sampling, temperature, table, width),
        *(count, size, pieces),
        NOISE=sampling is not None,
        IDS=ids is not None,
        K=k,
        TILES=x.shape[0] // TILE,
        EVEN=size % cut["BLOCK_K"] == 0,
        **cut,
        **turns(x),
    )
    _rank[(rows or x.shape[0],)](
        *(*parts, table, *found, width, pieces),
        IDS=ids is not None,
        K=k,
        PIECES=triton.next_power_of_2(pieces),
        num_warps=8 if pieces <= 4096 else 32,  # what a thread keeps fits its registers
        **turns(x),
    )
    return found

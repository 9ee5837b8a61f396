"""The walk down a draft tree; see :mod:`hispec_kernels.follow`. One program, one warp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hispec_kernels.gpu.turns import take_turn, turns


@triton.jit
def _follow(
    token_ptr,
    parent_ptr,
    pick_ptr,
    path_ptr,
    end_ptr,
    nodes,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    take_turn(TURNS)
    node = tl.arange(0, BLOCK)
    there = node < nodes
    tokens = tl.load(token_ptr + node, mask=there, other=-1)
    parents = tl.load(parent_ptr + node, mask=there, other=-1)
    tokens = tl.where(node > 0, tokens, -1)  # nobody's child
    at = 0
    length = 0
    pick = tl.load(pick_ptr)
    for _ in range(1, nodes):
        child = tl.min(tl.where((parents == at) & (tokens == pick), node, nodes), 0)
        found = child < nodes
        tl.store(path_ptr + length, child.to(tl.int64), mask=found)
        length += found.to(tl.int32)
        at = tl.where(found, child, at)
        pick = tl.load(pick_ptr + at)
        # Once the walk has ended, no later step finds a child either: nothing has changed.
    tl.store(end_ptr, length.to(tl.int64))
    tl.store(end_ptr + 1, pick)


def follow(tokens: Tensor, parents: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the accepted path below the root and where it ends, all on the device.

    Args:
        tokens: (N,) int64 ids ≥ 0; node 0 is the root, siblings differ.
        parents: (N,) int64.
        picks: (N,) int64, the pick after each node.

    Returns:
        path: (N,) int64, of which the first entries are nodes.
        end: (2,) int64, how many of them are, and the pick after the last.
    """
    nodes = tokens.shape[0]
    path, end = torch.empty_like(tokens), tokens.new_empty(2)
    block = max(2, triton.next_power_of_2(nodes))
    _follow[(1,)](
        tokens, parents, picks, path, end, nodes, BLOCK=block, num_warps=1, **turns(tokens)
    )
    return path, end

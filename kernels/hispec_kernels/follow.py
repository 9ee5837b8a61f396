"""Verification: walk a draft tree for as long as a child is what the level above picks.

The only verification rule there is. Greedy or sampled, chain or tree: a drafted token stands if and
only if it equals the pick at its parent; where no child does, the pick itself is the next token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hispec_kernels import gpu


def follow(tokens: Tensor, parents: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the accepted path below the root, and the pick after its last node.

    Args:
        tokens: (N,) int64, a node's token; node 0 is the root. Siblings differ.
        parents: (N,) int64, a node's parent, always before it; ignored for the root.
        picks: (N,) int64, the verifying level's pick *after* each node.

    Returns:
        path: (A,) int64 node indices from the root's child down, A ≥ 0.
        token: () int64, the pick after the last node of the path (after the root if A = 0).
    """
    if tokens.is_cuda and not gpu.why_not(tokens.device):
        from hispec_kernels.gpu.follow import follow as on_gpu

        path, end = on_gpu(tokens, parents, picks)
        return path[: int(end[0])], end[1]  # sync: the path's length is its shape
    match = tokens == picks[parents]
    match[0] = True
    # A node is reached when all its ancestors match. Siblings differ, so at most one child of a
    # node matches and the reached nodes form a single path; parents come first, so it is in order.
    reached = match
    ancestors = parents.clone()
    ancestors[0] = 0
    while True:
        wider = reached & reached[ancestors]
        if torch.equal(wider, reached):  # sync: depth is small, so are the rounds: log2(depth)
            break
        reached, ancestors = wider, ancestors[ancestors]
    path = reached.nonzero().flatten()
    return path[1:], picks[path[-1]]

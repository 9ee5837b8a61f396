"""What the rows of a pass are and where, as kernels read it: a small int32 array on the device.

    [0] slot      of the first row; row r is in slot + r
    [1] width     real rows
    [2] root      slot and position of the tree's root; ``STRAIGHT`` where slots are positions
    [3] round     slot of the round's root, tree or chain
    [4 …]         ids: (32,) the rows' tokens, where they are to be embedded
    [36 …]        depths: (32,) steps below the root, by node
    [68 …]        paths: (32, 32), the ancestor of a node at a depth; see hispec.model.nodes

The host fills it before a pass, so a captured graph runs at any place and on any tree.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Nodes of a tree, and rows of a pass, at most.
NODES = 32
ROOT = 3
IDS = 4
DEPTHS = IDS + NODES
PATHS = DEPTHS + NODES
LENGTH = PATHS + NODES * NODES
#: A root behind all slots: no row is on a tree.
STRAIGHT = 1 << 30


@triton.jit
def positions(plan_ptr, row, mask):
    """Returns the positions of rows."""
    slot = tl.load(plan_ptr) + row
    root = tl.load(plan_ptr + 2)
    node = slot - root
    depth = tl.load(plan_ptr + 36 + node, mask=mask & (node >= 0), other=0)
    return tl.where(node < 0, slot, root + depth)

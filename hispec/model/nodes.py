"""Where the nodes of a draft tree stand: each in a slot of the cache, at a position of the text.

    slot      root + i           in the order of drafting, every node its own
    position  root + depth[i]    what rotates keys and seeds noise: siblings share theirs

Before the root, slot and position are the same. Node 0 is the root. Node i looks at every slot
before the root and at its own path. A chain is the tree whose slots are positions throughout.

The compiled passes read depths and paths in place, so they lie in arrays that never move.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

#: The most nodes of a tree, its root included, and so the widest pass of a round.
MAX_WIDTH = 32


class Nodes:
    """The shape of a tree whose root is in slot ``root``; grown in place.

    Attributes:
        root: the root's slot and position.
        parents: each node's parent; the root is its own.
        depths: steps below the root.
        depths_array: (MAX_WIDTH,) int32, the depths; past the last node anything.
        paths_array: (MAX_WIDTH, MAX_WIDTH) int32; ``paths_array[i, d]`` is the ancestor of node i
            at depth d, for d up to its own, where that is i itself; behind it anything.
    """

    __slots__ = ("depths", "depths_array", "parents", "paths_array", "root")

    def __init__(self, root: int) -> None:
        self.root = root
        self.parents = [0]
        self.depths = [0]
        self.depths_array = np.zeros(MAX_WIDTH, np.int32)
        self.paths_array = np.zeros((MAX_WIDTH, MAX_WIDTH), np.int32)

    @staticmethod
    def line(root: int, count: int) -> Nodes:
        """Returns a chain of ``count`` nodes, the root included."""
        nodes = Nodes(root)
        for node in range(count - 1):
            nodes.append(node)
        return nodes

    def __len__(self) -> int:
        return len(self.parents)

    def append(self, parent: int) -> int:
        """Adds a child of ``parent`` and returns its number."""
        node = len(self.parents)
        assert node < MAX_WIDTH, "a tree has at most MAX_WIDTH nodes"
        assert 0 <= parent < node, "a child comes after its parent"
        depth = self.depths[parent] + 1
        self.parents.append(parent)
        self.depths.append(depth)
        self.depths_array[node] = depth
        self.paths_array[node, :depth] = self.paths_array[parent, :depth]
        self.paths_array[node, depth] = node
        return node

    def keep(self, kept: Sequence[int]) -> None:
        """Leaves only the nodes ``kept``, numbered by their place in it.

        Args:
            kept: ascending, the root first, every node's parent among them.
        """
        check_kept(kept, len(self))
        number = {old: new for new, old in enumerate(kept)}
        parents = [number[self.parents[old]] for old in kept[1:]]
        del self.parents[1:], self.depths[1:]
        for parent in parents:
            self.append(parent)

    def path(self, node: int) -> list[int]:
        """Returns the nodes from the root down to ``node``, both included."""
        return self.paths_array[node, : self.depths[node] + 1].tolist()

    def chain(self, first: int = 0) -> bool:
        """Returns whether nodes ``first`` and later, with all their ancestors, are a chain.

        Then slots are positions for all of them, and no node has a sibling: one whose depth is its
        number has all earlier ones for ancestors.
        """
        return first >= len(self) or self.straight(len(self))

    def straight(self, count: int) -> bool:
        """Returns whether the first ``count`` nodes are a chain."""
        assert count <= len(self), "there are rows of nodes that the tree lacks"
        return count <= 0 or self.depths[count - 1] == count - 1

    def positions(self, start: int, stop: int) -> list[int]:
        """Returns the positions of the slots ``start`` … ``stop - 1``."""
        root = self.root
        return [
            slot if slot < root else root + self.depths[slot - root] for slot in range(start, stop)
        ]


def check_kept(kept: Sequence[int], count: int) -> None:
    """Asserts that ``kept`` are numbers of ``count`` nodes, ascending, the root among them."""
    assert kept and kept[0] == 0, "a tree keeps its root"
    assert all(a < b for a, b in pairwise(kept)), "kept nodes ascend"
    assert kept[-1] < count, "there is no such node"

"""A draft tree: the root, the last committed token, and what may come after it.

Nodes are numbered in the order they were drafted, so a parent precedes its children and node 0 is
the root. A chain is a tree in which node ``i + 1`` is the child of node ``i``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hispec_kernels import follow as follow_op


class Tree:
    """Drafted tokens below a root.

    Attributes:
        tokens: N ids; ``tokens[0]`` is the root.
        parents: N node numbers; the root is its own parent.
    """

    __slots__ = ("parents", "tokens")

    def __init__(self, root: int) -> None:
        self.tokens = [root]
        self.parents = [0]

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, token: int) -> None:
        """Adds ``token`` as the child of the newest node."""
        self.parents.append(len(self.tokens) - 1)
        self.tokens.append(token)

    def truncate(self, nodes: int) -> None:
        """Keeps the first ``nodes`` nodes, at least the root."""
        assert nodes >= 1, "a tree keeps its root"
        del self.tokens[nodes:], self.parents[nodes:]


def follow(tree: Tree, picks: Sequence[int], first: int = 0) -> tuple[list[int], int]:
    """Walks down from node ``first`` for as long as a child equals the pick at its parent.

    Args:
        tree: what was drafted.
        picks: a level's pick after each of the nodes ``first``, …, ``len(tree) - 1``.
        first: the last node this level already stands behind; all later ones descend from it.

    Returns:
        The accepted nodes below ``first``, in order, and the pick after the last of them.
    """
    tokens = torch.tensor(tree.tokens[first:])
    parents = torch.tensor(tree.parents[first:]).sub_(first).clamp_(min=0)
    path, token = follow_op(tokens, parents, torch.tensor(picks))
    return (path + first).tolist(), int(token)

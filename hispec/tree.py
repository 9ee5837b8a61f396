"""A draft tree: the root, the last committed token, and what may come after it.

Nodes are numbered in the order they were drafted, so a parent precedes its children and node 0 is
the root; siblings differ. A chain is a tree in which node ``i + 1`` is the child of node ``i``.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from hispec.model.nodes import Nodes
from hispec.model.passes import Token

#: Stands for an id that a device has picked and the host has not looked at; no id is negative.
UNREAD = -1


class Tree:
    """Drafted tokens below a root.

    Attributes:
        tokens: N ids, or UNREAD; ``tokens[0]`` is the root's.
        origins: N names of the level or source that put a token there; the root's is empty.
        values: N estimated chances that the text gets to a node; the root's is 1.
        nodes: parents, depths and places in the cache.
    """

    __slots__ = ("_children", "_unread", "nodes", "origins", "tokens", "values")

    def __init__(self, root: int, position: int = 0) -> None:
        """Plants ``root``, a token id, at an absolute ``position``."""
        self.tokens = [root]
        self.origins = [""]
        self.values = [1.0]
        self.nodes = Nodes(position)
        self._children: dict[tuple[int, int], int] = {}
        self._unread: dict[int, Tensor] = {}  # () int64 each, by node

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, token: int, parent: int, origin: str = "", value: float = 0.0) -> int:
        """Adds ``token`` below the node ``parent``, which has no such child; returns its number."""
        assert (parent, token) not in self._children, "siblings differ"
        node = self.nodes.append(parent)
        self.tokens.append(token)
        self.origins.append(origin)
        self.values.append(value)
        self._children[parent, token] = node
        return node

    def append_unread(self, token: Tensor, parent: int, origin: str) -> int:
        """Adds a () int64 of a device below a node without children, without looking at it."""
        node = self.append(UNREAD, parent, origin)
        self._unread[node] = token
        return node

    def known(self) -> list[Token]:
        """Returns the tokens by node, the unread ones as the device has them."""
        return [self._unread.get(node, token) for node, token in enumerate(self.tokens)]

    def read(self, beside: Tensor | None = None) -> list[list[int]]:
        """Looks at all unread tokens at once, and at other ids beside them, which it returns.

        Args:
            beside: (W, k) int64, on the tokens' device.
        """
        if not self._unread:
            return [] if beside is None else beside.tolist()  # sync: the host walks
        unread = torch.stack(list(self._unread.values()))
        looked = unread if beside is None else torch.cat([unread, beside.flatten()])
        ids: list[int] = looked.tolist()  # sync: likewise
        rest, wide = ids[len(unread) :], 1 if beside is None else beside.shape[1]
        for node, token in zip(self._unread, ids[: len(unread)], strict=True):
            parent = self.nodes.parents[node]
            del self._children[parent, UNREAD]
            self._children[parent, token] = node
            self.tokens[node] = token
        self._unread.clear()
        return [rest[at : at + wide] for at in range(0, len(rest), wide)]

    def child(self, node: int, token: int) -> int | None:
        """Returns the child of ``node`` that holds ``token``, if there is one."""
        return self._children.get((node, token))

    def path(self, node: int) -> list[int]:
        """Returns the ids below the root down to ``node``; none for the root itself."""
        return [self.tokens[at] for at in self.nodes.path(node)[1:]]

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps these nodes alone and renumbers them: ascending, from the root, with their parents.

        Args:
            kept: node numbers; ``kept[0]`` is 0.
        """
        assert kept[0] == 0, "a tree keeps its root"
        assert not self._unread, "tokens are looked at before any is rejected"
        self.nodes.keep(kept)
        self.tokens = [self.tokens[node] for node in kept]
        self.origins = [self.origins[node] for node in kept]
        self.values = [self.values[node] for node in kept]
        self._children = {
            (self.nodes.parents[node], self.tokens[node]): node for node in range(1, len(kept))
        }


def follow(
    tree: Tree, picks: Sequence[int], first: int = 0, stops: Container[int] = ()
) -> tuple[list[int], int]:
    """Walks down from node ``first`` for as long as a child equals the pick at its parent.

    The only verification rule: greedy or sampled, chain or tree. ``hispec_kernels.follow`` is the
    same walk on tensors.

    Args:
        tree: what was drafted.
        picks: a level's pick after each of the nodes ``first``, …, ``len(tree) - 1``; only those
            that the walk reaches are read.
        first: the last node this level already stands behind.
        stops: ids that end a text: what was drafted behind one counts for nothing.

    Returns:
        The accepted nodes below ``first``, in order, and the pick after the last of them.
    """
    path: list[int] = []
    node = first
    while True:
        token = picks[node - first]
        child = tree.child(node, token)
        if child is None or (path and tree.tokens[node] in stops):
            return path, token
        path.append(child)
        node = child

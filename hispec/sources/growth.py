"""Growing a small tree from "what follows this suffix", likeliest nodes first.

:func:`grow` says what is grown; where a compiler is at hand :class:`Grower` grows the same from
counts and recycled logits, in one call (``hispec_kernels/cpu/growth.c``).
"""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Callable, Sequence

import numpy as np

from hispec.sources.source import Candidate

#: The last ids, oldest first → what may follow (best first), the grade of each, and the last ids
#: that are worth knowing for what follows then.
Successors = Callable[[tuple[int, ...]], tuple[Sequence[int], Sequence[int], tuple[int, ...]]]

LEAST = 0.03  # a node's chance below which nothing is proposed


def grow(
    successors: Successors,
    suffix: tuple[int, ...],
    budget: int,
    priors: Sequence[float],
    depth: int,
) -> list[Candidate]:
    """Returns the paths of the tree of the ``budget`` likeliest nodes.

    Nodes are taken from a heap by the product of their grades' chances. Of the nodes that follow
    the same parent only the best not yet taken is in the heap, and what follows a node is only
    asked when no other node in the heap can be likelier.

    Args:
        successors: called at most once for a node.
        suffix: the last ids of the text.
        budget: nodes.
        priors: the chance of each grade.
        depth: no path is longer.
    """
    highest = max(priors)
    tokens: list[int] = []
    grades: list[int] = []
    parents: list[int] = []
    chances: list[float] = []
    behind: list[tuple[int, ...]] = []  # the last ids up to a node, as far as they matter
    levels: list[int] = []
    rows: list[tuple[Sequence[int], Sequence[int], int, float, tuple[int, ...]]] = []
    heap: list[tuple[float, int, int]] = []  # -chance, row, rank in it; or -bound, node, −1

    def look(suffix: tuple[int, ...], parent: int, chance: float) -> None:
        ids, kinds, known = successors(suffix)
        if ids:
            heapq.heappush(heap, (-chance * priors[kinds[0]], len(rows), 0))
            rows.append((ids, kinds, parent, chance, known))

    look(suffix, -1, 1.0)
    while heap and len(tokens) < budget:
        loss, number, rank = heap[0]
        if -loss < LEAST:
            break
        if rank < 0:
            heapq.heappop(heap)
            look(behind[number], number, chances[number])
            continue
        ids, kinds, parent, chance, known = rows[number]
        if rank + 1 < len(ids):
            heapq.heapreplace(heap, (-chance * priors[kinds[rank + 1]], number, rank + 1))
        else:
            heapq.heappop(heap)
        level = levels[parent] + 1 if parent >= 0 else 1
        if level < depth:
            heapq.heappush(heap, (loss * highest, len(tokens), -1))
        tokens.append(ids[rank])
        grades.append(kinds[rank])
        parents.append(parent)
        chances.append(-loss)
        behind.append((*known, ids[rank]))
        levels.append(level)
    return _paths(tokens, grades, parents)


def _paths(tokens: Sequence[int], grades: Sequence[int], parents: Sequence[int]) -> list[Candidate]:
    """Returns the paths to the leaves of a tree; −1 is the parent of those that have none."""
    inner = set(parents)
    paths = []
    for leaf in range(len(tokens)):
        if leaf in inner:
            continue
        path = []
        node = leaf
        while node >= 0:
            path.append(node)
            node = parents[node]
        path.reverse()
        paths.append(path)
    paths.sort()  # likelier nodes have lower numbers: the likeliest branch first, at every depth
    return [Candidate([tokens[i] for i in path], [grades[i] for i in path]) for path in paths]


class Grower:
    """Grows one source's trees with a function of the compiled library; see :func:`grow`.

    Args:
        function: ``grow_counts`` or ``grow_recycled``.
        priors: the chance of each grade.
        depth: no path is longer.
    """

    #: The largest tree, in nodes.
    MOST = 32

    def __init__(self, function: Callable[..., int], priors: Sequence[float], depth: int) -> None:
        self._function = function
        self._priors = np.array(priors, np.float64)
        self._highest = max(priors)
        self._depth = depth
        self._nodes = np.empty((3, self.MOST), np.int64)  # tokens, grades, parents
        self._addresses = self._priors.ctypes.data, self._nodes.ctypes.data

    def grow(
        self, tables: ctypes.Structure, suffix: tuple[int, ...], budget: int
    ) -> list[Candidate]:
        """Returns the paths of the tree of the ``budget`` likeliest nodes.

        Args:
            tables: what the function grows from.
            suffix: the last ids of the text, as many as it takes at most.
            budget: nodes, at most ``MOST``.
        """
        priors, nodes = self._addresses
        ids = (ctypes.c_int64 * len(suffix))(*suffix)
        count = self._function(
            *(ctypes.byref(tables), ids, len(suffix), budget),
            *(priors, self._highest, self._depth, nodes),
        )
        return _paths(*self._nodes[:, :count].tolist())

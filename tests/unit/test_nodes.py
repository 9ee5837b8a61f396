"""Nodes against walking up the parents, over random programs of growing and keeping."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hispec.model.nodes import MAX_WIDTH, Nodes


def walk(parents: list[int], node: int) -> list[int]:
    """The path to ``node``, found from below."""
    path = [node]
    while node != 0:
        node = parents[node]
        path.append(node)
    return path[::-1]


def is_right(nodes: Nodes, root: int, parents: list[int]) -> None:
    assert nodes.root == root
    assert nodes.parents == parents
    assert len(nodes) == len(parents)
    paths = [walk(parents, node) for node in range(len(parents))]
    assert nodes.depths == [len(path) - 1 for path in paths]
    assert [nodes.path(node) for node in range(len(parents))] == paths
    assert nodes.depths_array[: len(parents)].tolist() == nodes.depths
    for node, path in enumerate(paths):
        assert nodes.paths_array[node, : len(path)].tolist() == path
    for first in range(len(parents) + 1):
        family = {node for late in range(first, len(parents)) for node in paths[late]}
        in_order = all(paths[node] == list(range(node + 1)) for node in family)
        assert nodes.chain(first) == in_order
        assert nodes.straight(first) == all(paths[i] == list(range(i + 1)) for i in range(first))
    slots = range(max(0, root - 2), root + len(parents))
    wanted = [slot if slot < root else root + len(paths[slot - root]) - 1 for slot in slots]
    assert nodes.positions(slots.start, slots.stop) == wanted


@settings(max_examples=150, deadline=None)
@given(root=st.integers(0, 5), data=st.data())
def test_random_programs(root: int, data: st.DataObject) -> None:
    nodes, parents = Nodes(root), [0]
    depths, paths = nodes.depths_array.ctypes.data, nodes.paths_array.ctypes.data
    for _ in range(data.draw(st.integers(0, 4))):
        for _ in range(data.draw(st.integers(0, MAX_WIDTH - len(parents)))):
            late = data.draw(st.booleans())  # as chains do
            parent = len(parents) - 1 if late else data.draw(st.integers(0, len(parents) - 1))
            assert nodes.append(parent) == len(parents)
            parents.append(parent)
        is_right(nodes, root, parents)
        kept = [0]
        for node in range(1, len(parents)):
            if parents[node] in kept and data.draw(st.integers(0, 3)):
                kept.append(node)
        nodes.keep(kept)
        parents = [kept.index(parents[node]) for node in kept]
        is_right(nodes, root, parents)
    assert nodes.depths_array.ctypes.data == depths, "compiled passes hold the address"
    assert nodes.paths_array.ctypes.data == paths
    for array in (nodes.depths_array, nodes.paths_array):
        assert array.flags.c_contiguous
        assert array.dtype == "int32"


def test_a_line_is_a_chain() -> None:
    for count in (1, 2, MAX_WIDTH):
        is_right(Nodes.line(7, count), 7, [max(0, node - 1) for node in range(count)])
        assert Nodes.line(7, count).chain()


def test_what_is_no_tree_is_refused() -> None:
    nodes = Nodes.line(0, MAX_WIDTH)
    with pytest.raises(AssertionError, match="at most"):
        nodes.append(0)
    for kept in ([], [1], [0, 2, 1], [0, MAX_WIDTH]):
        with pytest.raises(AssertionError):
            nodes.keep(kept)
    with pytest.raises(KeyError):  # node 1 goes, its child would stay
        nodes.keep([0, 2])
    with pytest.raises(AssertionError, match="after its parent"):
        Nodes(0).append(1)

"""The draft tree; the walk over it is tested with the kernel it calls."""

from __future__ import annotations

import pytest

from hispec.tree import Tree, follow


def test_a_tree_grows_at_its_newest_node_and_shrinks_to_its_root() -> None:
    tree = Tree(7)
    assert (len(tree), tree.tokens, tree.parents) == (1, [7], [0])
    for token in (8, 8, 9):
        tree.append(token)
    assert (tree.tokens, tree.parents) == ([7, 8, 8, 9], [0, 0, 1, 2])
    tree.truncate(2)
    tree.append(5)
    assert (tree.tokens, tree.parents) == ([7, 8, 5], [0, 0, 1])
    tree.truncate(9)
    assert len(tree) == 3
    tree.truncate(1)
    assert len(tree) == 1
    with pytest.raises(AssertionError, match="root"):
        tree.truncate(0)


def test_follow_takes_the_path_and_the_pick_behind_it() -> None:
    tree = Tree(7)
    for token in (1, 2, 3):
        tree.append(token)
    assert follow(tree, [1, 2, 3, 4]) == ([1, 2, 3], 4)
    assert follow(tree, [1, 2, 9, 4]) == ([1, 2], 9)
    assert follow(tree, [9, 2, 3, 4]) == ([], 9)
    assert follow(tree, [3, 4], first=2) == ([3], 4)
    assert follow(tree, [5], first=3) == ([], 5)
    assert follow(Tree(7), [5]) == ([], 5)


def test_follow_goes_to_a_sibling() -> None:
    tree = Tree(7)
    tree.tokens += [1, 2, 3]
    tree.parents += [0, 0, 2]  # 1 and 2 below the root, 3 below 2
    assert follow(tree, [2, 0, 3, 6]) == ([2, 3], 6)
    assert follow(tree, [1, 5, 3, 6]) == ([1], 5)

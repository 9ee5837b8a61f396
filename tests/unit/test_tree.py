"""The draft tree and the walk over it."""

from __future__ import annotations

import random

import pytest
import torch

from hispec.tree import UNREAD, Tree, follow
from hispec_kernels import follow as follow_op


def test_a_tree_grows_below_any_node_and_knows_its_paths() -> None:
    tree = Tree(7, 40)
    a = tree.append(8, 0, "exit 4")
    b = tree.append(9, 0, "context")
    c = tree.append(8, b)
    assert (a, b, c) == (1, 2, 3)
    assert tree.tokens == [7, 8, 9, 8]
    assert tree.origins == ["", "exit 4", "context", ""]
    assert (tree.nodes.parents, tree.nodes.depths) == ([0, 0, 0, 2], [0, 1, 1, 2])
    assert (tree.path(0), tree.path(a), tree.path(c)) == ([], [8], [9, 8])
    assert (tree.child(0, 9), tree.child(0, 5), tree.child(b, 8)) == (b, None, c)
    with pytest.raises(AssertionError, match="siblings differ"):
        tree.append(9, 0)


def test_a_pruned_tree_is_as_if_it_had_never_known_the_rest() -> None:
    for seed in range(50):
        draw = random.Random(seed)
        tree = Tree(0)
        for _ in range(draw.randrange(1, 25)):
            parent, token = draw.randrange(len(tree)), draw.randrange(6)
            if tree.child(parent, token) is None:
                tree.append(token, parent, f"level {draw.randrange(3)}")
        kept = sorted({n for _ in range(3) for n in tree.nodes.path(draw.randrange(len(tree)))})
        fresh, place = Tree(0), {0: 0}
        for node in kept[1:]:
            parent = place[tree.nodes.parents[node]]
            place[node] = fresh.append(tree.tokens[node], parent, tree.origins[node])
        tree.keep(kept)
        assert (tree.tokens, tree.origins) == (fresh.tokens, fresh.origins)
        assert tree.nodes.parents == fresh.nodes.parents
        assert tree._children == fresh._children
    with pytest.raises(AssertionError, match="root"):
        tree.keep([1])


def test_follow_takes_the_path_and_the_pick_behind_it() -> None:
    tree = Tree(7)
    for parent, token in enumerate((1, 2, 3)):
        tree.append(token, parent)
    assert follow(tree, [1, 2, 3, 4]) == ([1, 2, 3], 4)
    assert follow(tree, [1, 2, 9, 4]) == ([1, 2], 9)
    assert follow(tree, [9, 2, 3, 4]) == ([], 9)
    assert follow(tree, [3, 4], first=2) == ([3], 4)
    assert follow(tree, [5], first=3) == ([], 5)
    assert follow(Tree(7), [5]) == ([], 5)


def test_what_a_device_has_picked_is_read_at_once() -> None:
    tree = Tree(7)
    first = tree.append_unread(torch.tensor(5), 0, "exit 4")
    second = tree.append_unread(torch.tensor(6), first, "exit 4")
    third = tree.append(8, second)
    assert tree.tokens == [7, UNREAD, UNREAD, 8]
    assert [int(token) for token in tree.known()] == [7, 5, 6, 8]
    assert tree.child(0, 5) is None
    tree.read()
    tree.read()
    assert tree.tokens == [7, 5, 6, 8] == tree.known()
    assert (tree.child(0, 5), tree.child(first, 6), tree.child(second, 8)) == (first, second, third)
    assert tree.child(0, UNREAD) is None


def test_follow_goes_to_a_sibling() -> None:
    tree = Tree(7)
    tree.append(1, 0)
    second = tree.append(2, 0)
    tree.append(3, second)
    assert follow(tree, [2, 0, 3, 6]) == ([2, 3], 6)
    assert follow(tree, [1, 5, 3, 6]) == ([1], 5)


def test_follow_reads_only_the_picks_it_reaches() -> None:
    read: list[int] = []

    class Lazy(list):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    tree = Tree(7)
    tree.append(1, 0)
    second = tree.append(2, 0)
    tree.append(3, second)
    picks = Lazy([2, 0, 3, 6])
    follow(tree, picks)
    assert read == [0, 2, 3]


def test_follow_is_the_walk_of_the_kernel() -> None:
    for seed in range(100):
        draw = random.Random(seed)
        tree = Tree(0)
        for _ in range(draw.randrange(20)):
            parent, token = draw.randrange(len(tree)), draw.randrange(4)
            if tree.child(parent, token) is None:
                tree.append(token, parent)
        picks = [draw.randrange(4) for _ in range(len(tree))]
        path, token = follow_op(
            torch.tensor(tree.tokens), torch.tensor(tree.nodes.parents), torch.tensor(picks)
        )
        assert follow(tree, picks) == (path.tolist(), int(token))

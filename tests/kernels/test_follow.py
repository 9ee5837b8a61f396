"""``follow`` against walking the tree by hand, on random trees."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hispec.tree import Tree
from hispec.tree import follow as follow_tree
from hispec_kernels import follow


@st.composite
def trees(draw) -> tuple[list[int], list[int], list[int]]:
    """Tokens, parents and picks over few ids, so that paths are often long; siblings differ."""
    seed = draw(st.integers(0, 2**32))
    size = draw(st.integers(1, 40))
    ids = draw(st.integers(2, 5))
    bushy = draw(st.floats(0, 1))
    source = random.Random(seed)
    tokens, parents = [source.randrange(ids)], [0]
    taken: dict[int, set[int]] = {}
    for node in range(1, size):
        parent = source.randrange(node) if source.random() < bushy else node - 1
        free = set(range(ids)) - taken.get(parent, set())
        if not free:
            parent, free = node - 1, set(range(ids)) - taken.get(node - 1, set())
        token = source.choice(sorted(free))
        taken.setdefault(parent, set()).add(token)
        tokens.append(token)
        parents.append(parent)
    picks = [source.randrange(ids) for _ in tokens]
    for node in range(1, size):  # make agreement likely
        if source.random() < 0.6:
            picks[parents[node]] = tokens[node]
    return tokens, parents, picks


def by_hand(tokens: list[int], parents: list[int], picks: list[int]) -> tuple[list[int], int]:
    path, node = [], 0
    while True:
        children = [
            child
            for child in range(1, len(tokens))
            if parents[child] == node and tokens[child] == picks[node]
        ]
        if not children:
            return path, picks[node]
        (node,) = children
        path.append(node)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(trees())
def test_equals_walking_by_hand(tree) -> None:
    tokens, parents, picks = tree
    path, token = follow(torch.tensor(tokens), torch.tensor(parents), torch.tensor(picks))
    assert (path.tolist(), int(token)) == by_hand(tokens, parents, picks)


def test_paths_of_every_length_occur() -> None:
    lengths = set()
    for length in range(33):
        tokens = list(range(33))
        picks = [*range(1, 33), 99]
        picks[length] = 77
        chain = [0, *range(32)]
        path, token = follow(torch.tensor(tokens), torch.tensor(chain), torch.tensor(picks))
        assert path.tolist() == list(range(1, length + 1))
        assert token == 77
        lengths.add(len(path))
    assert len(lengths) == 33


def test_the_inputs_are_left_alone() -> None:
    tokens, parents, picks = torch.tensor([5, 6]), torch.tensor([0, 0]), torch.tensor([6, 7])
    follow(tokens, parents, picks)
    assert (tokens.tolist(), parents.tolist(), picks.tolist()) == ([5, 6], [0, 0], [6, 7])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=20), st.data())
def test_the_trees_follow_starts_anywhere_on_a_chain(tokens: list[int], data) -> None:
    first = data.draw(st.integers(0, len(tokens) - 1))
    picks = data.draw(
        st.lists(st.integers(0, 2), min_size=len(tokens) - first, max_size=len(tokens) - first)
    )
    tree = Tree(tokens[0])
    for parent, token in enumerate(tokens[1:]):
        tree.append(token, parent)
    wanted = first
    while wanted + 1 < len(tokens) and tokens[wanted + 1] == picks[wanted - first]:
        wanted += 1
    path, token = follow_tree(tree, picks, first)
    assert path == list(range(first + 1, wanted + 1))
    assert token == picks[wanted - first]

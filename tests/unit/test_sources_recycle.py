"""Recycled logits, and the tree that is grown from rows of successors."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hispec.sources import GRADES, recycle
from hispec.sources.growth import LEAST, grow
from hispec.sources.recycle import DEPTH, WIDTH, Recycle

V = 100


def row(*first: int) -> list[int]:
    """A row of top ids that starts as given."""
    return [*first, *range(90, 90 + WIDTH - len(first))]


def firsts(source: Recycle, path: tuple[int, ...] = (), budget: int = WIDTH) -> list[int]:
    """The ids proposed right after the path, likeliest first."""
    found = [c.tokens[0] for c in source.propose(path, budget)]
    return list(dict.fromkeys(found))


def test_newest_row_wins() -> None:
    source = Recycle(V)
    source.begin([5])
    assert source.propose((), 4) == []
    source.observe([5], np.array([row(1, 2)]))
    source.observe([5, 6, 5], np.array([row(3), row(4), row(7, 8)]))
    assert firsts(source)[:2] == [7, 8]
    source.commit([6])
    assert firsts(source)[0] == 4


def test_rejected_nodes_feed_the_next_tree() -> None:
    source = Recycle(V)
    source.begin([1, 2])
    # 3 was drafted after 2 and rejected; its own successor was computed with it
    source.observe([2, 3], np.array([row(4, 3), row(5)]), before=[1, 2])
    source.commit([4])
    source.commit([3])
    assert firsts(source)[0] == 5


def test_pairs_go_before_single_tokens() -> None:
    source = Recycle(V)
    source.observe([2], np.array([row(11)]), before=[1])
    source.observe([2], np.array([row(22)]), before=[9])
    source.begin([1, 2])
    assert firsts(source)[0] == 11
    source.begin([9])
    assert firsts(source, (2,))[0] == 22
    source.begin([8, 2])
    assert firsts(source)[0] == 22  # an unknown pair: what 2 was last followed by


def test_table_of_pairs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycle, "PAIRS", 4)
    source = Recycle(V)
    for token in range(10):
        source.observe([token], np.array([row(token + 1)]), before=[50])
    assert (source._owners >= 0).sum() == 4
    source.observe([9], np.array([row(33)]), before=[51])
    source.begin([50, 9])
    assert firsts(source)[0] == 10
    source.begin([50, 0])  # its pair was dropped
    assert firsts(source)[0] == 1


def test_a_reset_forgets() -> None:
    source = Recycle(V)
    source.begin([5])
    source.observe([5], np.array([row(8)]), before=[4])
    source.reset()
    assert source.propose((), 4) == []


def test_few_columns_and_budget_zero() -> None:
    source = Recycle(V)
    source.begin([5])
    source.observe([5], np.array([[1, 2]]))
    assert firsts(source) == [1, 2]
    assert source.propose((), 0) == []


def test_depth_is_bounded() -> None:
    source = Recycle(V)
    source.priors[WIDTH] = 0.9  # the best of a single token
    source.reset()
    source.begin([5])
    source.observe([5], np.array([row(5)]))
    assert max(len(c.tokens) for c in source.propose((), 30)) == DEPTH


@given(
    st.dictionaries(
        st.integers(0, 4),
        st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True),
        max_size=5,
    ),
    st.lists(st.integers(1, 9).map(lambda n: n / 10), min_size=3, max_size=3),
    st.integers(0, 12),
)
def test_grown_tree_is_the_likeliest_one(
    following: dict[int, list[int]], chances: list[float], budget: int
) -> None:
    priors = sorted(chances, reverse=True) + [0.0] * (GRADES - 3)

    def successors(suffix: tuple[int, ...]) -> tuple[list[int], list[int], tuple[int, ...]]:
        ids = following.get(suffix[-1], [])
        return ids, list(range(len(ids))), ()

    # every path of at most 3 nodes, with its chance
    every: dict[tuple[int, ...], float] = {}
    open_paths: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for _ in range(3):
        longer = []
        for path, ranks in open_paths:
            for rank, token in enumerate(following.get(path[-1] if path else 0, [])):
                longer.append(((*path, token), (*ranks, rank)))
                every[longer[-1][0]] = prod(priors[r] for r in longer[-1][1])
        open_paths = longer

    found = grow(successors, (0,), budget, priors, depth=3)
    nodes = {tuple(c.tokens[: i + 1]) for c in found for i in range(len(c.tokens))}
    worth = sorted((p for p in every.values() if p >= LEAST), reverse=True)[:budget]
    assert sorted((every[n] for n in nodes), reverse=True) == pytest.approx(worth)
    assert len({tuple(c.tokens) for c in found}) == len(found)
